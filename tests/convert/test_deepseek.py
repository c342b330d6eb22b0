"""DeepSeek-V3's files through a checkpoint: biases of choices stay float32, a layer after the last one is left out."""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml

from lmjax.checkpoint.slices import open_step
from lmjax.config import load_model
from lmjax.convert.families import FAMILIES
from lmjax.convert.importing import MODEL_FILE
from lmjax.convert.pieces import is_of_further_layer, pieces
from lmjax.convert.safetensors_files import SafetensorsWriter
from lmjax.convert.settings import read_config_file, write_json
from lmjax.convert.source import open_source
from lmjax.errors import InputError
from lmjax.models.config import DecoderConfig
from lmjax.nn.attention_latent import LatentConfig
from lmjax.nn.moe import MoEConfig
from tests.command import lmjax
from tests.convert.large_model import tensor_of
from tests.convert.test_exporting import equal, tensors

FAMILY = FAMILIES["deepseek_v3"]
CONFIG = DecoderConfig(
    vocab_size=64,
    max_length=16,
    embed_dim=32,
    num_layers=3,
    num_heads=4,
    head_dim=12,
    latent=LatentConfig(kv_rank=10, query_rank=14, rope_dim=4, value_dim=6),
    mlp_dim=40,
    rope_interleaved=True,
    moe=MoEConfig(
        num_experts=4,
        experts_per_token=2,
        expert_dim=24,
        dense_first=1,
        shared_dim=24,
        scores="sigmoid",
        groups=2,
        top_groups=1,
        choice_bias_rate=0.001,
    ),
)
BIASES = [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)]
FURTHER = {"model.layers.3.eh_proj.weight": (32, 64), "model.layers.3.mlp.gate.weight": (4, 32)}
"""Of a layer that predicts a second next token."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    keys = FAMILY.write_config(CONFIG) | {"num_nextn_predict_layers": 1}
    write_json(directory / "config.json", {"model_type": "deepseek_v3", "torch_dtype": "bfloat16", **keys})
    shapes = {piece.name: piece.shape for piece in pieces(FAMILY, CONFIG)} | FURTHER
    writer = SafetensorsWriter(
        directory, list(shapes.items()), dtype="bfloat16", shard_bytes=1 << 20, in_float32=BIASES
    )
    for name, shape in shapes.items():
        writer.write(name, tensor_of(name, shape))
    writer.finish()
    return directory


def test_the_files_come_back_without_the_further_layer(source, tmp_path, capsys):
    assert set(tensors(source)) > set(FURTHER)
    assert lmjax("convert", "import", str(source), str(tmp_path / "ours")) == 0
    assert "left out: 2 tensors of layers that predict further tokens" in capsys.readouterr().out
    assert lmjax("convert", "export", str(tmp_path / "ours"), str(tmp_path / "out")) == 0
    found = tensors(tmp_path / "out")
    assert equal(found, {name: tensor for name, tensor in tensors(source).items() if name not in FURTHER})
    assert {name for name, tensor in found.items() if tensor.dtype == np.float32} == set(BIASES)
    assert {tensor.dtype for tensor in found.values()} == {np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)}
    assert read_config_file(tmp_path / "out") == read_config_file(source) | {"num_nextn_predict_layers": 0}


def test_biases_of_choices_are_not_rounded(source, tmp_path):
    assert lmjax("convert", "import", str(source), str(tmp_path / "ours")) == 0
    with open_step(tmp_path / "ours" / "checkpoints") as reader:
        found = reader.read("segments/1/blocks/0/moe/router/choice_bias")
    expected = np.stack([tensor_of(name, (4,)) for name in BIASES])
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(expected, expected.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_the_model_file_has_what_differs_from_the_defaults(source, tmp_path):
    assert lmjax("convert", "import", str(source), str(tmp_path / "ours")) == 0
    ours = load_model(str(tmp_path / "ours" / MODEL_FILE))
    assert ours == open_source(source).config
    assert ours.latent == CONFIG.latent
    section = yaml.safe_load((tmp_path / "ours" / MODEL_FILE).read_text())["model"]["latent"]
    assert section == {"kv_rank": 10, "query_rank": 14, "rope_dim": 4, "value_dim": 6}


@pytest.mark.fast
def test_a_layer_before_the_last_one_is_not_left_out(source):
    """Nor is one of a family that has no further layers."""
    write_json(source / "config.json", read_config_file(source) | {"num_hidden_layers": 4})
    with pytest.raises(InputError, match=r"missing(.|\n)*model\.layers\.3\.self_attn"):
        open_source(source)
    write_json(source / "config.json", read_config_file(source) | {"num_hidden_layers": 3})
    family = dataclasses.replace(FAMILY, further_layers=None)
    assert is_of_further_layer(FAMILY, CONFIG, "model.layers.3.eh_proj.weight")
    assert not is_of_further_layer(family, CONFIG, "model.layers.3.eh_proj.weight")
    assert not is_of_further_layer(FAMILY, CONFIG, "model.layers.2.mlp.gate.weight")
