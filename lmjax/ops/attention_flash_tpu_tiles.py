"""Tile sizes of the TPU kernel by generation: an estimate from what the compiler schedules, measured on no chip.

``benchmarks/attention_tiles.py`` made the table; its result stands in ``benchmarks/results/attention_tiles.jsonl``.
"""

from typing import NamedTuple


class Tiling(NamedTuple):
    """How a row is divided."""

    tile: int
    """Positions of a tile, at most; a multiple of 128."""
    part: int
    """Keys whose scores the forward pass makes at once: the fewer, the less of them leaves the registers."""


TILINGS = {
    "v4": {64: Tiling(512, 512), 128: Tiling(512, 512), 256: Tiling(512, 512)},
    "v5e": {64: Tiling(512, 128), 128: Tiling(512, 128), 256: Tiling(256, 256)},
    "v5p": {64: Tiling(512, 128), 128: Tiling(512, 128), 256: Tiling(512, 128)},
    "v6e": {64: Tiling(512, 512), 128: Tiling(512, 256), 256: Tiling(512, 256)},
    "7x": {64: Tiling(512, 512), 128: Tiling(512, 512), 256: Tiling(512, 512)},
}
"""By generation and head_dim, each for those up to it."""


def tiling_of(generation: str, dim: int) -> Tiling:
    """For keys or values as long as ``dim``, whichever are longer; at most 256."""
    return next(sizes for most, sizes in TILINGS[generation].items() if dim <= most)
