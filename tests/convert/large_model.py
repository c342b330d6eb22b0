"""Models as large as is asked for, written tensor by tensor; and a watch on what memory is taken."""

import dataclasses
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.convert.families import FAMILIES
from lmjax.convert.pieces import Piece, pieces
from lmjax.convert.safetensors_files import SafetensorsWriter
from lmjax.convert.settings import CONFIG_FILE, write_json
from lmjax.models.config import DecoderConfig
from lmjax.nn.moe import MoEConfig

PASSED = 77
"""The exit code of a process that took more than its limit."""
NOISE = np.random.default_rng(0).standard_normal((1 << 22) + 1, dtype=np.float32) * np.float32(0.02)
"""Longer by one than a power of two, so that no two rows or tensors repeat each other."""


def tensor_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a tensor: noise that begins elsewhere for each name, float32."""
    start = sum(number * byte for number, byte in enumerate(name.encode(), 1)) * 7919 % len(NOISE)
    return np.resize(np.roll(NOISE, -start), math.prod(shape)).reshape(shape)


def write_model(
    directory: Path,
    config: DecoderConfig,
    *,
    family: str = "llama",
    dtype: Any = "float32",
    shard_bytes: int = 2_000_000_000,
    **settings: Any,
) -> list[Piece]:
    """A Hugging Face directory with that model, and ``settings`` in its config.json besides."""
    directory.mkdir(parents=True)
    wanted = pieces(FAMILIES[family], config)
    shapes = [(piece.name, piece.shape) for piece in wanted]
    writer = SafetensorsWriter(directory, shapes, dtype=dtype, shard_bytes=shard_bytes)
    for piece in wanted:
        writer.write(piece.name, tensor_of(piece.name, piece.shape))
    writer.finish()
    keys = {"model_type": family, "torch_dtype": dtype, **FAMILIES[family].write_config(config), **settings}
    write_json(directory / CONFIG_FILE, keys)
    return wanted


def large_config(family: str, num_bytes: int) -> DecoderConfig:
    """A model of about so many bytes in float32: of the Llama kind, or of that of Mixtral or DBRX."""
    layer = DecoderConfig(
        vocab_size=32_000, max_length=2048, embed_dim=2048, num_heads=16, mlp_dim=8192, num_layers=1, norm_epsilon=1e-6
    )
    if family != "llama":
        experts = MoEConfig(num_experts=8, experts_per_token=2)
        layer = dataclasses.replace(layer, embed_dim=1024, mlp_dim=4096, moe=experts)
    if family == "dbrx":
        layer = dataclasses.replace(layer, norm="layer", norm_epsilon=1e-5, qkv_clip=8.0)

    def bytes_of(num_layers: int) -> int:
        config = dataclasses.replace(layer, num_layers=num_layers)
        return sum(4 * math.prod(piece.shape) for piece in pieces(FAMILIES[family], config))

    of_layer = bytes_of(2) - bytes_of(1)
    return dataclasses.replace(layer, num_layers=max(1, 1 + round((num_bytes - bytes_of(1)) / of_layer)))


def anonymous_bytes() -> int:
    """Memory of this process that is not of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Watch(threading.Thread):
    """Ends the process when it has more anonymous memory than its limit; looks every 20 ms."""

    def __init__(self, limit: int):
        super().__init__(daemon=True)
        self._limit = limit
        self.peak = 0
        self.start()

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_bytes())
            if self.peak > self._limit:
                os._exit(PASSED)
            time.sleep(0.02)
