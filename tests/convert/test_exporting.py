"""What is exported is what came in, tensor by tensor, and says what it is."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lmjax.checkpoint.slices import open_step
from lmjax.convert.card import Training
from lmjax.convert.exporting import export_model
from lmjax.convert.families import FAMILIES
from lmjax.convert.importing import import_model
from lmjax.convert.pieces import pieces
from lmjax.convert.safetensors_files import SafetensorsWriter
from lmjax.convert.settings import write_json
from lmjax.convert.source import open_source, read_model
from lmjax.convert.tensors import open_tensors
from lmjax.errors import InputError
from lmjax.models.config import DecoderConfig
from tests.convert.large_model import tensor_of, write_model
from tests.convert.test_importing import nothing_but
from tests.convert.test_source import CONFIG


class Drawn:
    """Parameters that are random, and the same each time they are read."""

    def __init__(self, config: DecoderConfig):
        from lmjax.models.shapes import parameter_shapes

        self.shapes = parameter_shapes(config)

    def chunk(self, path: str) -> tuple[int, ...]:
        return self.shapes[path]

    def read_stored(self, path: str, index: Any = ()) -> np.ndarray:
        return tensor_of(path, self.shapes[path])[index]


def tensors(directory: Path) -> dict[str, np.ndarray]:
    files = open_tensors(directory)
    return {name: np.array(files.read(name)) for name in files.infos}


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes() for name in one
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_and_out_is_bit_equal(tmp_path, dtype):
    write_model(tmp_path / "source", CONFIG, dtype=dtype, eos_token_id=7)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    import_model(tmp_path / "source", tmp_path / "ours")
    kept, reports = tmp_path / "ours" / "huggingface", []
    config = open_source(tmp_path / "source").config
    with open_step(tmp_path / "ours" / "checkpoints") as step:
        found = export_model(
            step,
            config,
            tmp_path / "out",
            huggingface=kept,
            shard_bytes=40_000,
            progress=lambda done, total: reports.append((done, total)),
        )
    assert equal(tensors(tmp_path / "out"), tensors(tmp_path / "source"))
    assert reports[-1] == (found.num_bytes, found.num_bytes)
    assert found.dtype == dtype
    assert found.num_shards > 1
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((kept / "config.json").read_text())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == found.num_shards
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    other = tensors(tmp_path / "out")
    other["model.norm.weight"] = other["model.norm.weight"] + other["model.norm.weight"].dtype.type(1)
    assert not equal(other, tensors(tmp_path / "source"))


def test_any_dtype_out_of_any(tmp_path):
    write_model(tmp_path / "source", CONFIG)
    source = open_source(tmp_path / "source")
    export_model(source, source.config, tmp_path / "half", huggingface=tmp_path / "source", dtype="bfloat16")
    halves = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors(tmp_path / "source").items()}
    assert equal(tensors(tmp_path / "half"), halves)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    half = open_source(tmp_path / "half")
    export_model(half, half.config, tmp_path / "full", dtype="float32")
    assert equal(tensors(tmp_path / "full"), {name: tensor.astype(np.float32) for name, tensor in halves.items()})


@pytest.mark.parametrize("name", ["bloom", "falcon", "gpt2", "opt", "phi3"])
def test_every_kind_of_layout_in_small_parts(tmp_path, name):
    """Fused, grouped, input first, tied, and with rows of positions that are never read."""
    family = FAMILIES[name]
    biases = name in ("bloom", "gpt2", "opt")
    config = DecoderConfig(
        vocab_size=90,
        max_length=16,
        embed_dim=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads={"falcon": 1, "phi3": 2}.get(name),
        mlp_dim=128,
        norm="rms" if name == "phi3" else "layer",
        norm_bias=name != "phi3",
        **dict.fromkeys(("qkv_bias", "attention_out_bias", "mlp_bias"), biases),
        activation={"phi3": "silu", "opt": "relu", "falcon": "gelu"}.get(name, "gelu_tanh"),  # pyright: ignore
        mlp_gated=name == "phi3",
        residual="parallel_shared_norm" if name == "falcon" else "sequential",
        position={"bloom": "alibi", "gpt2": "learned", "opt": "learned"}.get(name, "rope"),  # pyright: ignore
        embed_norm=name == "bloom",
        tie_embeddings=name != "phi3",
    )
    settings = {"model_type": name, **family.write_config(config)}
    config = read_model(family, settings, name)
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write_json(source / "config.json", settings)
    wanted = [(piece.name, piece.shape) for piece in pieces(family, config)]
    writer = SafetensorsWriter(source, wanted, dtype="bfloat16", shard_bytes=1 << 40)
    for tensor, shape in wanted:
        writer.write(tensor, tensor_of(tensor, shape))
    writer.finish()
    import_model(source, tmp_path / "ours")
    with open_step(tmp_path / "ours" / "checkpoints") as step:
        found = export_model(step, config, out, huggingface=tmp_path / "ours" / "huggingface", dtype="bfloat16")
    assert found.model_type == name
    assert equal(tensors(out), tensors(source))


def test_a_model_from_scratch_finds_its_family(tmp_path):
    found = export_model(
        Drawn(CONFIG),
        CONFIG,
        tmp_path / "out",
        files={"tokenizer.json": b"{}"},
        special_tokens={"bos_token_id": 1, "eos_token_id": 2},
        training=Training(steps=500, tokens=1_000_000, losses={"evaluation": 2.5}, commit="abc", config="seed: 1\n"),
    )
    assert (found.model_type, found.dtype, found.num_shards) == ("llama", "float32", 1)
    keys = json.loads((tmp_path / "out" / "config.json").read_text())
    assert keys["architectures"] == ["LlamaForCausalLM"]
    assert keys["eos_token_id"] == 2
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2}
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "# out",
        "| Updates | 500 |",
        "| Loss (evaluation), nats a token | 2.5000 |",
        "(commit abc)",
        "seed: 1",
    ):
        assert line in card
    assert "random parameters" in card
    assert "starting from" not in card
    assert open_source(tmp_path / "out").config.num_layers == 3


def test_a_changed_model_keeps_what_is_not_of_the_decoder(tmp_path):
    write_model(tmp_path / "source", CONFIG, eos_token_id=7)
    config = dataclasses.replace(open_source(tmp_path / "source").config, max_length=64)
    export_model(Drawn(config), config, tmp_path / "out", huggingface=tmp_path / "source")
    keys = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (keys["max_position_embeddings"], keys["eos_token_id"]) == (64, 7)


@pytest.mark.fast
def test_a_model_that_no_family_has_is_refused_with_what_differs(tmp_path):
    config = dataclasses.replace(CONFIG, attention_sinks=True, qk_norm="head")
    with pytest.raises(InputError, match=r"The closest is \w+, which differs in:\n") as caught:
        export_model(Drawn(config), config, tmp_path / "out")
    assert "attention_sinks: True, and there False" in str(caught.value)
    assert nothing_but(tmp_path)


def test_a_full_disk_leaves_nothing(tmp_path, file_size_limit):
    with file_size_limit(20_000), pytest.raises(InputError, match="cannot be written") as caught:
        export_model(Drawn(CONFIG), CONFIG, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert nothing_but(tmp_path)
    export_model(Drawn(CONFIG), CONFIG, tmp_path / "out")
    with pytest.raises(InputError, match="not empty"):
        export_model(Drawn(CONFIG), CONFIG, tmp_path / "out")


@pytest.mark.fast
def test_a_budget_that_is_too_small_is_refused_with_the_arithmetic(tmp_path):
    with pytest.raises(InputError, match=r"--memory-budget: 0\.5 GB is too little.*give at least"):
        export_model(Drawn(CONFIG), CONFIG, tmp_path / "out", memory_budget=500_000_000)
    assert nothing_but(tmp_path)


def test_transformers_loads_it(tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    export_model(Drawn(CONFIG), CONFIG, tmp_path / "out", shard_bytes=40_000, dtype="bfloat16")
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto"
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]
    assert str(model.dtype) == "torch.bfloat16"
    written = tensors(tmp_path / "out")
    for name, parameter in model.state_dict().items():
        assert np.array_equal(parameter.float().numpy(), written[name].astype(np.float32)), name
