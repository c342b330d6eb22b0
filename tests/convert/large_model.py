"""Models of the Llama kind, as large as is asked for, written tensor by tensor; and a watch on what memory is taken."""

import dataclasses
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from lmjax.convert.families.llama import FAMILY
from lmjax.convert.pieces import Piece, pieces
from lmjax.convert.safetensors_files import SafetensorsWriter
from lmjax.convert.settings import CONFIG_FILE, write_json
from lmjax.models.config import DecoderConfig

PASSED = 77
"""The exit code of a process that took more than its limit."""
NOISE = np.random.default_rng(0).standard_normal((1 << 22) + 1, dtype=np.float32) * np.float32(0.02)
"""Longer by one than a power of two, so that no two rows or tensors repeat each other."""


def tensor_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a tensor: noise that begins elsewhere for each name, float32."""
    start = sum(number * byte for number, byte in enumerate(name.encode(), 1)) * 7919 % len(NOISE)
    return np.resize(np.roll(NOISE, -start), math.prod(shape)).reshape(shape)


def write_model(
    directory: Path, config: DecoderConfig, *, dtype: Any = "float32", shard_bytes: int = 2_000_000_000, **settings: Any
) -> list[Piece]:
    """A Hugging Face directory with that model, and ``settings`` in its config.json besides."""
    directory.mkdir(parents=True)
    wanted = pieces(FAMILY, config)
    shapes = [(piece.name, piece.shape) for piece in wanted]
    writer = SafetensorsWriter(directory, shapes, dtype=dtype, shard_bytes=shard_bytes)
    for piece in wanted:
        writer.write(piece.name, tensor_of(piece.name, piece.shape))
    writer.finish()
    keys = {"model_type": "llama", "torch_dtype": dtype, **FAMILY.write_config(config), **settings}
    write_json(directory / CONFIG_FILE, keys)
    return wanted


def large_config(num_bytes: int) -> DecoderConfig:
    """A model of about so many bytes in float32."""
    layer = DecoderConfig(
        vocab_size=32_000, max_length=2048, embed_dim=2048, num_heads=16, mlp_dim=8192, num_layers=1, norm_epsilon=1e-6
    )
    of_layer = sum(4 * math.prod(piece.shape) for piece in pieces(FAMILY, layer) if ".layers." in piece.name)
    tables = 2 * 4 * layer.vocab_size * layer.embed_dim
    return dataclasses.replace(layer, num_layers=max(1, round((num_bytes - tables) / of_layer)))


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
