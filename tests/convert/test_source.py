"""A directory is checked whole before it is read, and read in any slices."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from lmjax.convert.families.llama import FAMILY
from lmjax.convert.pieces import pieces
from lmjax.convert.resemblance import resolved
from lmjax.convert.safetensors_files import SafetensorsWriter
from lmjax.convert.settings import CONFIG_FILE
from lmjax.convert.source import open_source
from lmjax.errors import InputError
from tests import tiny
from tests.convert.large_model import tensor_of, write_model

CONFIG = dataclasses.replace(tiny.CONFIG, num_kv_heads=2, num_layers=3, norm_epsilon=1e-6)
UP = "segments/0/blocks/0/mlp/up/kernel"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_model(tmp_path / "source", CONFIG, shard_bytes=40_000)
    return tmp_path / "source"


def edit(directory: Path, **changes: Any) -> None:
    file = directory / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(directory: Path, changes: dict[str, np.ndarray | None]) -> None:
    """Write the weights again, in one file, with some tensors changed, added, or (None) left out."""
    for file in directory.glob("model*"):
        file.unlink()
    tensors = {piece.name: tensor_of(piece.name, piece.shape) for piece in pieces(FAMILY, CONFIG)} | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    shapes = [(name, tensor.shape) for name, tensor in kept.items()]
    writer = SafetensorsWriter(directory, shapes, dtype="float32", shard_bytes=1 << 40)
    for name, tensor in kept.items():
        writer.write(name, tensor)
    writer.finish()


@pytest.mark.fast
def test_parameters_are_the_transposed_and_stacked_tensors(source):
    opened = open_source(source)
    assert resolved(opened.config) == resolved(CONFIG)
    assert opened.family.model_type == "llama"
    assert opened.dtype == "float32"
    found = opened.read(UP)
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    expected = np.stack([tensor_of(name, (48, 32)).T for name in names])
    assert np.array_equal(found, expected)
    assert not np.array_equal(found[0], found[1])
    out = tensor_of("model.layers.1.self_attn.o_proj.weight", (32, 32)).T.reshape(8, 4, 32)
    assert np.array_equal(opened.read("segments/0/blocks/0/attention/out/kernel", (1,)), out)
    table = opened.read("embed/table")
    assert np.array_equal(table[:90], tensor_of("model.embed_tokens.weight", (90, 32)))
    assert table.shape == (128, 32)
    assert not table[90:].any()


@pytest.mark.fast
@pytest.mark.parametrize(
    "index",
    [(), (2,), (slice(1, 3),), (slice(None), slice(5, 9)), (1, 7, slice(3, None)), (slice(0, 0),), (-1, -2, -1)],
    ids=str,
)
def test_a_slice_is_that_of_the_whole(source, index):
    opened = open_source(source)
    for path in (UP, "segments/0/blocks/0/attention/key/kernel", "embed/table"):
        part = index[: len(opened.leaves[path].shape)]
        found, expected = opened.read(path, part), opened.read(path)[part]
        assert found.shape == expected.shape
        assert np.array_equal(found, expected)


@pytest.mark.fast
def test_rows_of_a_table_across_its_padding(source):
    opened = open_source(source)
    whole = opened.read("embed/table")
    for rows in (slice(80, 100), slice(90, 95), slice(100, 128), slice(3, 4)):
        assert np.array_equal(opened.read("embed/table", (rows, slice(1, 9))), whole[rows, 1:9])


@pytest.mark.fast
def test_fewer_bits_are_read_as_they_are_and_as_float32(tmp_path):
    write_model(tmp_path / "source", CONFIG, dtype="bfloat16")
    opened = open_source(tmp_path / "source")
    expected = tensor_of("model.layers.2.mlp.up_proj.weight", (48, 32)).T.astype(ml_dtypes.bfloat16)
    stored, full = opened.read_stored(UP, (2,)), opened.read(UP, (2,))
    assert opened.dtype == "bfloat16"
    assert stored.dtype == ml_dtypes.bfloat16
    assert np.array_equal(stored, expected)
    assert full.dtype == np.float32
    assert np.array_equal(full, expected.astype(np.float32))


def test_parameters_on_any_mesh(source):
    opened = open_source(source)
    for sizes in ((1, 1, 1), (2, 2, 2)):
        structs = tiny.blueprint_of(opened.config, tiny.mesh_of(*sizes)).state.params
        placed = jax.tree_util.tree_leaves_with_path(opened.place(structs))
        assert len(placed) == len(opened.leaves)
        for path, array in placed:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            assert np.array_equal(np.asarray(array), opened.read(name)), name


@pytest.mark.fast
def test_names_without_the_first_part(source):
    expected = open_source(source).read(UP)
    names = [piece.name for piece in pieces(FAMILY, CONFIG)]
    bare: dict[str, Any] = dict.fromkeys(names)
    for piece in pieces(FAMILY, CONFIG):
        bare[piece.name.removeprefix("model.")] = tensor_of(piece.name, piece.shape)
    rewrite(source, bare)
    assert np.array_equal(open_source(source).read(UP), expected)


@pytest.mark.fast
def test_all_that_is_wrong_is_one_list(source):
    wrong: dict[str, Any] = {f"model.layers.{layer}.mlp.gate_proj.weight": None for layer in range(3)}
    wrong |= {f"model.layers.{layer}.self_attn.q_proj.bias": np.ones(32, np.float32) for layer in (0, 2)}
    wrong |= {"model.norm.weight": np.ones(31, np.float32), "score.weight": np.ones((2, 32), np.float32)}
    rewrite(source, wrong)
    with pytest.raises(InputError) as caught:
        open_source(source)
    lines = str(caught.value).splitlines()
    assert "3 tensors missing:" in lines
    assert "  model.layers.{0..2}.mlp.gate_proj.weight: [48, 32]" in lines
    assert "3 tensors that the model does not have:" in lines
    assert "  model.layers.{0,2}.self_attn.q_proj.bias: [32]" in lines
    assert "  score.weight: [2, 32]" in lines
    assert "1 tensor of another shape:" in lines
    assert "  model.norm.weight: [31] in the file, [32] by config.json" in lines


@pytest.mark.fast
def test_integers_are_not_weights(source):
    import safetensors.numpy

    rewrite(source, {})
    file = source / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(tensors | {"model.norm.weight": np.ones(32, np.int32)}, file)
    with pytest.raises(InputError, match=r"model\.norm\.weight: int32, which is not float32 or bfloat16"):
        open_source(source)


@pytest.mark.fast
def test_a_tied_head_in_the_file_is_the_embedding_or_refused(source):
    table = tensor_of("model.embed_tokens.weight", (90, 32))
    edit(source, tie_word_embeddings=True)
    rewrite(source, {"lm_head.weight": table})
    opened = open_source(source)
    assert opened.config.tie_embeddings
    assert not any(path.startswith("head") for path in opened.leaves)
    changed = table.copy()
    changed[89, 31] += 1
    rewrite(source, {"lm_head.weight": changed})
    with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        open_source(source)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, r"model_type 'mamba' that is known; these families are: .*gpt2.*llama"),
        ({"model_type": None}, "no model_type that is known"),
        ({"hidden_act": "swish2"}, 'hidden_act is "swish2"'),
        ({"rope_scaling": {"rope_type": "xpos", "factor": 2}}, 'rope_type "xpos" is not supported'),
        ({"clip_everything": 3}, "clip_everything: 3"),
        ({"num_attention_heads": 5}, "not a model that the decoder can be"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_its_name(source, changes, message):
    edit(source, **changes)
    with pytest.raises(InputError, match=message):
        open_source(source)


@pytest.mark.fast
def test_a_shard_that_is_missing_or_cut_off(source):
    shards = sorted(source.glob("*.safetensors"))
    assert len(shards) > 2
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[:-1])
    with pytest.raises(InputError, match=f"{shards[1].name}.*cut off"):
        open_source(source)
    shards[1].unlink()
    with pytest.raises(InputError, match=f"missing: {shards[1].name}"):
        open_source(source)
