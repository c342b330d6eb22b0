"""What is imported is the source, bit for bit, on any mesh; and what cannot be imported leaves nothing."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from lmjax.checkpoint.manifest import read_manifest, verify
from lmjax.checkpoint.restore import restore
from lmjax.checkpoint.slices import open_step
from lmjax.config import load_model
from lmjax.convert import importing
from lmjax.convert.importing import import_model, read_extras
from lmjax.convert.source import open_source
from lmjax.errors import InputError
from tests import tiny
from tests.convert.large_model import tensor_of, write_model
from tests.convert.test_source import CONFIG


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    write_model(path, CONFIG, shard_bytes=40_000, eos_token_id=7)
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "generation_config.json").write_text('{"eos_token_id": 7}')
    (path / "optimizer.pt").write_text("not of the model")
    return path


def nothing_but(directory: Path, *names: str) -> bool:
    return sorted(path.name for path in directory.iterdir()) == sorted(names)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_checkpoint_is_the_source_on_any_mesh(tmp_path, dtype):
    write_model(tmp_path / "source", CONFIG, dtype=dtype)
    opened = open_source(tmp_path / "source")
    reports = []
    found = import_model(opened, tmp_path / "out", progress=lambda done, total: reports.append((done, total)))
    assert (found.model_type, found.source_dtype) == ("llama", dtype)
    assert reports[-1][0] == reports[-1][1]
    assert len(reports) == len(opened.leaves)
    checkpoints = tmp_path / "out" / "checkpoints"
    assert verify(checkpoints, 0).problems == ()
    for sizes in ((1, 1, 1), (2, 2, 2)):
        structs = tiny.blueprint_of(opened.config, tiny.mesh_of(*sizes)).state.params
        restored = restore(checkpoints, structs, part="params")
        assert restored is not None
        assert restored.step == 0
        for path, array in jax.tree_util.tree_leaves_with_path(restored.state):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            assert array.dtype == np.float32
            assert np.array_equal(np.asarray(array), opened.read(name)), name
    with open_step(checkpoints) as step:
        assert step.read_stored("embed/table").dtype.name == dtype
        assert step.read("embed/table").dtype == np.float32


def test_the_directory_has_the_config_and_what_came_along(source, tmp_path):
    import_model(source, tmp_path / "out")
    out = tmp_path / "out"
    assert nothing_but(out, "model.yaml", "huggingface", "checkpoints")
    kept = ("config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json")
    assert nothing_but(out / "huggingface", *kept)
    for name in kept:
        assert (out / "huggingface" / name).read_bytes() == (source / name).read_bytes()
    assert load_model(str(out / "model.yaml")) == open_source(source).config
    metadata = read_manifest(out / "checkpoints", 0).metadata
    assert (metadata["source"], metadata["model_type"], metadata["dtype"]) == ("source", "llama", "float32")
    assert metadata["config"]["model"]["embed_dim"] == 32


def test_a_budget_for_several_slices_gives_the_same_bits(source, tmp_path, monkeypatch):
    from lmjax.checkpoint import slices

    monkeypatch.setattr(slices, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(slices, "MIN_ROW_BYTES", 4096)
    reports = []
    import_model(source, tmp_path / "out", progress=lambda done, total: reports.append(done))
    opened = open_source(source)
    assert len(reports) > 2 * len(opened.leaves)
    with open_step(tmp_path / "out" / "checkpoints") as step:
        for name in opened.leaves:
            assert np.array_equal(step.read(name), opened.read(name)), name


def test_rows_that_are_never_read_are_kept_beside(tmp_path):
    """OPT's table of positions begins two rows before the first one."""
    from lmjax.convert.families.opt import FAMILY
    from lmjax.convert.pieces import pieces
    from lmjax.convert.safetensors_files import SafetensorsWriter
    from lmjax.convert.settings import write_json
    from lmjax.convert.source import read_model

    settings = {
        "model_type": "opt",
        "vocab_size": 90,
        "max_position_embeddings": 16,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
    }
    source = tmp_path / "source"
    source.mkdir()
    write_json(source / "config.json", settings)
    wanted = pieces(FAMILY, read_model(FAMILY, settings, "config.json"))
    writer = SafetensorsWriter(
        source, [(piece.name, piece.shape) for piece in wanted], dtype="bfloat16", shard_bytes=1 << 40
    )
    for piece in wanted:
        writer.write(piece.name, tensor_of(piece.name, piece.shape))
    writer.finish()
    import_model(source, tmp_path / "out")
    name = "model.decoder.embed_positions.weight"
    expected = tensor_of(name, (18, 32))[:2].astype(ml_dtypes.bfloat16).astype(np.float32)
    extras = read_extras(tmp_path / "out" / "huggingface")
    assert list(extras) == [name]
    assert np.array_equal(extras[name], expected)
    assert expected.any()


def test_a_directory_that_is_not_empty_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    import_model(source, tmp_path / "out")
    before = (tmp_path / "out" / "model.yaml").read_bytes()
    with pytest.raises(InputError, match="out: not empty"):
        import_model(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.yaml").read_bytes() == before
    file = tmp_path / "file"
    file.write_text("here")
    with pytest.raises(InputError, match="file: not a directory"):
        import_model(source, file)
    with pytest.raises(InputError, match=r"cannot be written \(.*\); part of the path is a file"):
        import_model(source, file / "out")
    with pytest.raises(InputError, match="give a local directory"):
        import_model(source, "s3://bucket/out")
    assert nothing_but(tmp_path, "source", "out", "file")


def test_a_full_disk_leaves_nothing(source, tmp_path, file_size_limit):
    with file_size_limit(5000), pytest.raises(InputError, match="cannot be written") as caught:
        import_model(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert nothing_but(tmp_path, "source")
    import_model(source, tmp_path / "out")


def test_an_import_that_was_killed_looks_like_none_and_is_cleared(source, tmp_path, monkeypatch):
    """A process that is killed removes nothing: here what would is switched off."""
    with monkeypatch.context() as patch:
        patch.setattr("lmjax.convert.output.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            import_model(source, tmp_path / "out", progress=interrupt)
    assert nothing_but(tmp_path, "source", ".out.unfinished")
    assert not list((tmp_path / ".out.unfinished").rglob("manifest.json"))
    import_model(source, tmp_path / "out")
    assert nothing_but(tmp_path, "source", "out")


def interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


@pytest.mark.fast
def test_a_budget_that_is_too_small_is_refused_with_the_arithmetic(source, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "slice_bytes", lambda shape, itemsize: 60_000_000)
    with pytest.raises(
        InputError, match=r"0\.4 GB is too little.*0\.06 GB is in memory 3 times; give at least 0\.63 GB"
    ):
        import_model(source, tmp_path / "out", memory_budget=400_000_000)
    assert nothing_but(tmp_path, "source")
    assert json.loads((source / "config.json").read_text())["model_type"] == "llama"
