"""Copies between arrays of other dtypes and orders, as fast where a matrix is transposed as memory allows.

NumPy transposes one element at a time. Here two or four rows are first woven into rows of 64-bit numbers, by
operations on whole rows, so that each of these that is moved has two or four elements: twice to four times the speed.
"""

import itertools

import numpy as np

LINES = 64
"""Rows of a block that is transposed, and"""
RUN = 2000
"""elements in each: it stays in a core's cache, and no power of two puts its columns in the same place of that."""
CACHED_BYTES = 1 << 15
"""A matrix of this size stays in the cache while NumPy transposes it."""
LOW = {2: np.uint64(0x0000FFFF0000FFFF), 4: np.uint64(0x00000000FFFFFFFF)}
"""By the bytes of an element: every second one of those in 64 bits, which have the first in their low bits."""


def cast_into(out: np.ndarray, values: np.ndarray) -> None:
    """Set ``out`` to ``values`` of the same shape, rounded to nearest even where its dtype has fewer bits."""
    assert out.shape == values.shape, f"{values.shape} into {out.shape}"
    if not out.size:
        return
    out, values = _merged(out, values)
    written, read = _fastest(out), _fastest(values)
    if written == read or values.itemsize * values.shape[written] * values.shape[read] <= CACHED_BYTES:
        np.copyto(out, values, casting="same_kind")
        return
    rest = [range(size) for dim, size in enumerate(out.shape) if dim not in (written, read)]
    out, values = (np.moveaxis(array, (read, written), (-2, -1)) for array in (out, values))
    for others in itertools.product(*rest):
        matrix, target = values[others].T, out[others]  # rows of the one are columns of the other
        for line, run in itertools.product(range(0, len(matrix), LINES), range(0, matrix.shape[1], RUN)):
            block = matrix[line : line + LINES, run : run + RUN]
            if block.dtype != out.dtype:
                block = block.astype(out.dtype)
            _transpose(target[run : run + RUN, line : line + LINES], block)


def _transpose(out: np.ndarray, block: np.ndarray) -> None:
    """``out`` (columns, rows) from ``block`` (rows, columns)."""
    size = out.dtype.itemsize
    step = 8 // size
    rows, columns = (length // step * step for length in block.shape)
    contiguous = out.strides[1] == block.strides[1] == size
    if size not in LOW or not contiguous or not rows or not columns:
        out[...] = block.T
        return
    out[:, rows:] = block[rows:].T
    out[columns:, :rows] = block[:rows, columns:].T
    words = block[:rows, :columns].view(np.uint64)
    target = out[:columns, :rows].view(np.uint64)
    for column, woven in zip(_woven_order(step), _weave(words, size), strict=True):
        target[column::step] = woven.T


def _woven_order(step: int) -> tuple[int, ...]:
    return (0, 1) if step == 2 else (0, 2, 1, 3)


def _weave(words: np.ndarray, size: int) -> list[np.ndarray]:
    """Rows of words of elements of ``size`` bytes, as rows of words that have elements of one column each."""
    low, bits = LOW[size], np.uint64(8 * size)
    first, second = words[0::2], words[1::2]
    even = first & low
    even |= (second & low) << bits
    odd = (first >> bits) & low
    odd |= second & ~low
    if size == 4:
        return [even, odd]
    return [*_weave(even, 4), *_weave(odd, 4)]


def _merged(out: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Views in which neighbouring dimensions are one where both arrays allow it."""
    shape = [size for size in out.shape if size != 1] or [1]
    out, values = _view(out, shape), _view(values, shape)
    dim = 0
    while dim < out.ndim - 1:
        inner = out.shape[dim + 1]
        if all(array.strides[dim] == inner * array.strides[dim + 1] for array in (out, values)):
            shape = [*out.shape[:dim], out.shape[dim] * inner, *out.shape[dim + 2 :]]
            out, values = _view(out, shape), _view(values, shape)
        else:
            dim += 1
    return out, values


def _fastest(array: np.ndarray) -> int:
    """The dimension along which neighbours in memory lie."""
    return min(range(array.ndim), key=lambda dim: (abs(array.strides[dim]), -dim))


def _view(array: np.ndarray, shape: list[int]) -> np.ndarray:
    return np.reshape(array, shape, copy=False)
