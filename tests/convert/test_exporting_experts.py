"""Experts through a checkpoint, whatever part of them is in one chunk of it: the same bits, each chunk read once, and
no more in memory than a chunk."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import yaml

from lmjax.checkpoint import slices
from lmjax.checkpoint.slices import StepReader, open_step
from lmjax.config import load_model
from lmjax.convert import check, exporting
from lmjax.convert.exporting import export_model
from lmjax.convert.families import FAMILIES
from lmjax.convert.importing import MODEL_FILE, import_model
from lmjax.convert.pieces import pieces
from lmjax.convert.safetensors_files import SafetensorsWriter
from lmjax.convert.settings import write_json
from lmjax.convert.source import open_source
from lmjax.errors import InputError
from lmjax.models.config import DecoderConfig
from lmjax.nn.moe import MoEConfig
from tests.convert.large_model import tensor_of
from tests.convert.test_exporting import equal, tensors

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "max_length": 16,
    "embed_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "mlp_dim": 40,
    "moe": MoEConfig(num_experts=6, experts_per_token=2),
}
CONFIGS = {
    "mixtral": DecoderConfig(**SIZES),
    "dbrx": DecoderConfig(**SIZES, norm="layer", qkv_clip=8.0),
}
EXPERT = 32 * 40
"""Values in a matrix of an expert."""
PATHS = [f"segments/0/blocks/0/moe/{name}/kernel" for name in ("gate", "up", "down")]
CHUNKS = {"three experts": 3 * EXPERT, "one expert": EXPERT, "a part of an expert": EXPERT // 4}
"""Values in a chunk."""


def write_source(directory: Path, name: str, dtype: str) -> Path:
    family, config = FAMILIES[name], CONFIGS[name]
    directory.mkdir()
    write_json(directory / "config.json", {"model_type": name, "torch_dtype": dtype, **family.write_config(config)})
    wanted = [(piece.name, piece.shape) for piece in pieces(family, config)]
    writer = SafetensorsWriter(directory, wanted, dtype=dtype, shard_bytes=100_000)
    for tensor, shape in wanted:
        writer.write(tensor, tensor_of(tensor, shape))
    writer.finish()
    return directory


class Watched:
    """A checkpoint, and how many values of the experts were read at a time."""

    def __init__(self, reader: StepReader):
        self.reader = reader
        self.read: list[int] = []

    def chunk(self, path: str) -> tuple[int, ...]:
        return self.reader.chunk(path)

    def read_stored(self, path: str, index: Any = ()) -> np.ndarray:
        values = self.reader.read_stored(path, index)
        if path in PATHS:
            self.read.append(values.size)
        return values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_experts_come_back_bit_by_bit_and_are_read_once(name, chunk, dtype, tmp_path, monkeypatch):
    itemsize = {"float32": 4, "bfloat16": 2}[dtype]
    monkeypatch.setattr(slices, "CHUNK_BYTES", itemsize * CHUNKS[chunk])
    monkeypatch.setattr(slices, "MIN_ROW_BYTES", 1)
    monkeypatch.setattr(exporting, "CHUNK_BYTES", 4 * CHUNKS[chunk])
    source = write_source(tmp_path / "source", name, dtype)
    done = [0]
    import_model(source, tmp_path / "ours", progress=lambda written, total: done.append(written))
    assert max(np.diff(done)) <= itemsize * CHUNKS[chunk]
    with open_step(tmp_path / "ours" / "checkpoints") as reader:
        assert np.prod(reader.chunk(PATHS[0])) == CHUNKS[chunk]
        watched = Watched(reader)
        export_model(watched, CONFIGS[name], tmp_path / "out", huggingface=tmp_path / "ours" / "huggingface")
        assert sum(watched.read) == len(PATHS) * 2 * 6 * EXPERT
        assert max(watched.read) <= CHUNKS[chunk]
        for path in PATHS:
            assert np.array_equal(reader.read(path), open_source(source).read(path)), path
    assert equal(tensors(tmp_path / "out"), tensors(source))


@pytest.mark.fast
@pytest.mark.parametrize("name", CONFIGS)
def test_any_part_of_the_experts_is_that_of_the_whole(name, tmp_path):
    opened = open_source(write_source(tmp_path / "source", name, "bfloat16"))
    theirs = tensors(tmp_path / "source")
    up = opened.read(PATHS[1])
    assert up.shape == (2, 6, 32, 40)
    if name == "mixtral":
        expected = theirs["model.layers.1.block_sparse_moe.experts.4.w3.weight"].T
    else:
        expected = theirs["transformer.blocks.1.ffn.experts.mlp.v1"].reshape(6, 40, 32)[4].T
    assert np.array_equal(up[1, 4], expected.astype(np.float32))
    for path in PATHS:
        whole = opened.read(path)
        assert whole.std() > 0.01
        for index in (
            (1,),
            (0, 5),
            (slice(None), slice(2, 4)),
            (1, slice(1, 3), slice(5, 9)),
            (-1, -1, 2),
            (1, 2, 3, 4),
        ):
            assert np.array_equal(opened.read(path, index), whole[index]), index
        assert opened.read_stored(path, (1, 2)).dtype == ml_dtypes.bfloat16


def test_the_model_file_has_what_differs_from_the_defaults(tmp_path):
    import_model(write_source(tmp_path / "source", "dbrx", "float32"), tmp_path / "ours")
    text = (tmp_path / "ours" / MODEL_FILE).read_text()
    assert yaml.safe_load(text)["model"]["moe"] == {"num_experts": 6, "experts_per_token": 2}
    assert load_model(str(tmp_path / "ours" / MODEL_FILE)) == open_source(tmp_path / "source").config


@pytest.mark.fast
def test_an_expert_that_differs_is_found_in_its_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "BLOCK_BYTES", 2 * 4 * EXPERT)
    one = open_source(write_source(tmp_path / "one", "mixtral", "float32"))
    assert not any(found.count for found in check.compare(one, one, one.config))

    class Changed:
        def read(self, path: str, index: Any = ()) -> np.ndarray:
            values = one.read(path)
            if path == PATHS[2]:
                values[1, 3, 0, 0] += 1
                values[1, 5, 1, 2] += 2
            return values[index]

    found = [each for each in check.joined(check.compare(one, Changed(), one.config)) if each.count]
    assert found == [(f"{PATHS[2]}[1]", 2, 6 * EXPERT, 2.0)]


@pytest.mark.fast
def test_experts_that_are_missing_are_one_line_a_matrix(tmp_path):
    source = write_source(tmp_path / "source", "mixtral", "float32")
    settings = {"model_type": "mixtral", **FAMILIES["mixtral"].write_config(CONFIGS["mixtral"])}
    write_json(source / "config.json", settings | {"num_local_experts": 9})
    with pytest.raises(InputError) as caught:
        open_source(source)
    for name in ("w1", "w2", "w3"):
        shape = "[32, 40]" if name == "w2" else "[40, 32]"
        line = f"  model.layers.{{0..1}}.block_sparse_moe.experts.{{6..8}}.{name}.weight: {shape}"
        assert line in str(caught.value).splitlines()
