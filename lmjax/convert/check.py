"""Two models compared, parameter by parameter and layer by layer, without either being whole in memory."""

import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from lmjax.checkpoint.slices import Index
from lmjax.models.config import DecoderConfig
from lmjax.models.shapes import parameter_shapes

BLOCK_BYTES = 1 << 26
"""Of a table, or of the experts of a block, that is compared at once."""
EXPERTS = re.compile(r"segments/.*/moe/(gate|up|down)/kernel")


class Parameters(Protocol):
    """Our parameters, read in slices: an opened step of a checkpoint, or a ``Source``."""

    def read(self, path: str, index: Index = ()) -> np.ndarray:
        """float32 values of the parameter at a path such as ``segments/0/blocks/0/mlp/up/kernel``."""
        ...


class Difference(NamedTuple):
    """How one slice of a parameter differs."""

    name: str
    """Its path, with the place along the dimension that layers are stacked along."""
    count: int
    """Values that differ; NaN equals NaN."""
    size: int
    """Values in all."""
    largest: float
    """The largest absolute difference; NaN where one value is NaN and the other is not."""


def shapes_differ(one: DecoderConfig, other: DecoderConfig) -> bool:
    """Whether the two have different parameters."""
    return _real_shapes(one) != _real_shapes(other)


def compare(one: Parameters, other: Parameters, config: DecoderConfig) -> Iterator[Difference]:
    """Every slice of every parameter, those that are equal too. Padding rows of tables are not looked at."""
    for path, shape in _real_shapes(config).items():
        for index in _slices(path, shape):
            left, right = one.read(path, index), other.read(path, index)
            differs = (left != right) & ~(np.isnan(left) & np.isnan(right))
            count = int(differs.sum())
            largest = float(np.abs(left[differs] - right[differs]).max()) if count else 0.0
            name = f"{path}[{index[0]}]" if index and isinstance(index[0], int) else path
            yield Difference(name, count, left.size, largest)


def joined(differences: Iterator[Difference]) -> Iterator[Difference]:
    """With the blocks of one table, or of one layer's experts, as one."""
    held: Difference | None = None
    for found in differences:
        if held is not None and held.name == found.name:
            largest = float(np.maximum(held.largest, found.largest))
            held = Difference(held.name, held.count + found.count, held.size + found.size, largest)
            continue
        if held is not None:
            yield held
        held = found
    if held is not None:
        yield held


def _real_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Without the rows beyond the vocabulary, or beyond the positions."""
    rows = {"embed/table": config.vocab_size, "head/table": config.vocab_size, "head_bias": config.vocab_size}
    rows["position/table"] = config.max_length
    shapes = parameter_shapes(config)
    return {path: (rows[path], *shape[1:]) if path in rows else shape for path, shape in shapes.items()}


def _slices(path: str, shape: tuple[int, ...]) -> Iterator[Index]:
    if EXPERTS.fullmatch(path):
        step = max(1, BLOCK_BYTES // (4 * int(np.prod(shape[2:]))))
        for layer in range(shape[0]):
            yield from ((layer, slice(start, min(start + step, shape[1]))) for start in range(0, shape[1], step))
        return
    if path.startswith("segments/"):
        yield from ((layer,) for layer in range(shape[0]))
        return
    step = max(1, BLOCK_BYTES // (4 * int(np.prod(shape[1:]))))
    yield from ((slice(start, min(start + step, shape[0])),) for start in range(0, shape[0], step))
