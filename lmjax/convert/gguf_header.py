"""What a GGUF file says before its data: the metadata, and where each tensor lies.

The gguf package's own reader makes several NumPy arrays of each string of the vocabulary, which takes seconds, and it
does not notice a file that is cut off. The layout of the file is in ggml's docs/gguf.md.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmjax.convert.mapped_files import reading
from lmjax.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
"""Types of values by their numbers in the file."""
STRING, ARRAY = 8, 9


class Packed(NamedTuple):
    """A tensor as it lies in the file."""

    shape: tuple[int, ...]
    """Of its numbers, the innermost dimension last."""
    kind: str
    """The name of its type, such as ``Q4_K``."""
    offset: int
    """From the start of the file, in bytes."""
    row_bytes: int
    """Of its innermost dimension."""


class Header(NamedTuple):
    path: Path
    metadata: dict[str, Any]
    """Numbers, booleans, strings, and lists of them."""
    tensors: dict[str, Packed]


class _DamagedError(Exception):
    pass


def read_header(path: Path) -> Header:
    """Raises InputError for a file that is not GGUF, is of a version that is not known, is cut off, or is damaged."""
    with reading(path):
        size = path.stat().st_size
        if size < 24:
            raise InputError(f"{path}: cut off, or not a GGUF file: it has {size} bytes; fetch it anew")
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    with mapped as content:
        magic, version = content[:4], int.from_bytes(content[4:8], "little")
        if magic != MAGIC:
            raise InputError(f"{path}: not a GGUF file: it begins with {magic!r}; fetch it anew")
        if version not in VERSIONS:
            raise InputError(
                f"{path}: GGUF version {version}, and {' and '.join(map(str, VERSIONS))} (little-endian) are read; "
                "make the file anew with llama.cpp's convert_hf_to_gguf.py"
            )
        try:
            metadata, tensors = _parse(_Cursor(content, 8))
        except _DamagedError as error:
            raise InputError(f"{path}: cut off or damaged: {error}; fetch it anew") from None
    return Header(path, metadata, tensors)


class _Cursor:
    """Reads values one after the other. Raises _DamagedError where the file ends first."""

    def __init__(self, content: mmap.mmap, position: int):
        self._content = content
        self.size = len(content)
        self.position = position

    def take(self, count: int) -> bytes:
        start, end = self.position, self.position + count
        if end > self.size:
            raise _DamagedError(f"{count} bytes are to come at byte {start}, and it has {self.size}")
        self.position = end
        return self._content[start:end]

    def number(self, code: str = "<Q") -> int:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self, size: int) -> int:
        """A number of values that take at least ``size`` bytes each."""
        found = self.number()
        if found * size > self.size - self.position:
            raise _DamagedError(f"{found} values are to come at byte {self.position}, and it has {self.size} bytes")
        return found

    def string(self) -> str:
        start = self.position
        try:
            return self.take(self.number()).decode()
        except UnicodeDecodeError:
            raise _DamagedError(f"the string at byte {start} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner = self.number("<I")
            if inner in SCALARS:
                length = self.count(SCALARS[inner].itemsize)
                return np.frombuffer(self.take(length * SCALARS[inner].itemsize), SCALARS[inner]).tolist()
            return [self.value(inner) for _ in range(self.count(8))]
        if kind not in SCALARS:
            raise _DamagedError(f"a value of the unknown type {kind} at byte {self.position}")
        return np.frombuffer(self.take(SCALARS[kind].itemsize), SCALARS[kind])[0].item()


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, Packed]]:
    num_tensors, num_keys = cursor.count(24), cursor.count(12)
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise _DamagedError(f"{key} is there twice")
        metadata[key] = cursor.value(cursor.number("<I"))
    entries = []
    for _ in range(num_tensors):
        name = cursor.string()
        dimensions = [cursor.number() for _ in range(cursor.number("<I"))]
        entries.append((name, tuple(reversed(dimensions)), cursor.number("<I"), cursor.number()))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _DamagedError(f"general.alignment is {alignment}, and has to be a power of two")
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, Packed] = {}
    end, before = start, "the header"
    for name, shape, kind, offset in sorted(entries, key=lambda entry: entry[3]):
        packed = _packed(name, shape, kind, start + offset)
        if name in tensors or packed.offset < end:
            raise _DamagedError(f"{name} {'is there twice' if name in tensors else f'overlaps {before}'}")
        end, before = packed.offset + math.prod(shape[:-1]) * packed.row_bytes, name
        if end > cursor.size:
            raise _DamagedError(f"{name} ends at byte {end}, and it has {cursor.size}")
        tensors[name] = packed
    return metadata, tensors


def _packed(name: str, shape: tuple[int, ...], number: int, offset: int) -> Packed:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if number not in GGMLQuantizationType.__members__.values():
        raise _DamagedError(f"{name} is of the unknown type {number}")
    kind = GGMLQuantizationType(number)
    block, size = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block:
        raise _DamagedError(f"{name} has the shape {list(shape)}, and {kind.name} has blocks of {block}")
    return Packed(shape, kind.name, offset, shape[-1] // block * size)
