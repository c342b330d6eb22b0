"""Files in the safetensors format: read through mapped memory, and written tensor by tensor.

The format is 8 bytes with the header's length, the header (JSON: of each tensor its dtype, its shape and its place),
and the data. The safetensors package copies each tensor, knows no bfloat16 for NumPy, and writes only models that are
in memory, so that this is code of our own; the tests compare it with the package in both directions.
"""

import contextlib
import json
import math
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import ml_dtypes
import numpy as np

from lmjax.convert.casting import cast_into
from lmjax.convert.mapped_files import Stored
from lmjax.data.files import REMEDIES
from lmjax.errors import InputError

SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
"""As the safetensors package has it."""
DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
WRITTEN = {"float32": "F32", "bfloat16": "BF16"}
PIECE_BYTES = 1 << 24
"""What is cast in one go, and"""
WRITE_BYTES = 1 << 18
"""what is written: for larger writes Linux looks for larger runs of free pages, which takes longer."""


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file. Raises InputError where it is cut off, or its header and its data do not fit."""

    def refuse(what: str) -> InputError:
        return InputError(f"{path}: {what}; fetch the file anew")

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start = 8 + length
        if size < 8 or length > MAX_HEADER_BYTES or start > size:
            raise refuse(f"cut off, or not a safetensors file: it has {size} bytes, and a header of {length}")
        content = file.read(length)
    try:
        header = json.loads(content, object_pairs_hook=_without_duplicates)
        header.pop("__metadata__", None)
        found = {name: _stored(entry, start) for name, entry in header.items()}
    except _UnknownDtypeError as error:
        raise InputError(f"{path}: a tensor has the dtype {error}; known are {', '.join(DTYPES)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise refuse(f"the header cannot be read ({error!r})") from None
    end = start
    for name, stored in sorted(found.items(), key=lambda item: (item[1].offset, _size(item[1]))):
        if stored.offset != end:
            kind = "overlaps the tensor before it" if stored.offset < end else "leaves a gap before it"
            raise refuse(f"{name} {kind}: it begins at byte {stored.offset} and not at {end}")
        end += _size(stored)
    if end != size:
        raise refuse(f"{'cut off' if size < end else 'too long'}: it has {size} bytes, and its header tells of {end}")
    return found


class _UnknownDtypeError(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _stored(entry: dict[str, Any], start: int) -> Stored:
    """An entry of the header. Raises ValueError, KeyError or TypeError where it is not one."""
    if entry["dtype"] not in DTYPES:
        raise _UnknownDtypeError(entry["dtype"])
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"not all sizes are whole numbers in {entry}")
    stored = Stored(shape, dtype, start + begin)
    if end - begin != _size(stored):
        raise ValueError(f"{end - begin} bytes for {entry['dtype']} {list(shape)}")
    return stored


def _size(stored: Stored) -> int:
    return math.prod(stored.shape) * stored.dtype.itemsize


class Tensor(NamedTuple):
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """Its name in the format."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class Shard(NamedTuple):
    """A file to be written, and where its tensors go."""

    path: Path
    header: bytes
    places: dict[str, Stored]


class SafetensorsWriter:
    """Writes the tensors of a model into one file, or into shards with an index; one piece of a tensor at a time.

    The caller gives a new directory and makes it visible after ``finish``: until then the files are not whole.
    """

    def __init__(
        self,
        directory: Path,
        tensors: Sequence[tuple[str, tuple[int, ...]]],
        *,
        dtype: Literal["float32", "bfloat16"],
        shard_bytes: int,
        in_float32: Collection[str] = (),
    ):
        """``tensors`` are the names and shapes of all that will be written, in the order in which they lie in the
        files; a shard has at most ``shard_bytes`` of them, or a single tensor. Those named by ``in_float32`` are that
        whatever ``dtype`` is."""
        self._directory = directory
        planned = [Tensor(name, shape, WRITTEN["float32" if name in in_float32 else dtype]) for name, shape in tensors]
        self._shards = _plan(directory, planned, shard_bytes)
        self._shard_of = {name: shard for shard in self._shards for name in shard.places}
        assert len(self._shard_of) == len(tensors), "two tensors have one name"
        self._left = {shard.path: set(shard.places) for shard in self._shards}
        self._open: dict[Path, BinaryIO] = {}
        self.total_bytes = sum(_size(place) for shard in self._shards for place in shard.places.values())
        """Of the tensors, in the dtype that is written."""

    def write(self, name: str, array: np.ndarray) -> None:
        """Write a tensor, rounded to nearest, ties to even. Raises InputError where the disk is full."""
        shard = self._shard_of[name]
        place = shard.places[name]
        left = self._left[shard.path]
        assert name in left, f"{name} is written a second time"
        assert array.shape == place.shape, f"{name} has the shape {array.shape}, and {place.shape} was planned"
        rows = array.reshape(1) if array.ndim == 0 else array
        step = max(1, PIECE_BYTES * len(rows) // max(1, _size(place)))
        with self._writing(shard.path):
            if shard.path not in self._open:
                self._open[shard.path] = shard.path.open("wb")
                self._open[shard.path].write(shard.header)
            file = self._open[shard.path]
            file.seek(place.offset)
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                piece = part
                if part.dtype != place.dtype or not part.flags.c_contiguous:
                    piece = np.empty(part.shape, place.dtype)
                    cast_into(piece, part)
                content = piece.reshape(-1).view(np.uint8).data
                for begin in range(0, len(content), WRITE_BYTES):
                    file.write(content[begin : begin + WRITE_BYTES])
            left.remove(name)
            if not left:
                _sync(file)
                self._open.pop(shard.path).close()

    def finish(self) -> None:
        """Write the index, where there are shards. All tensors have to be written."""
        missing = sorted(name for left in self._left.values() for name in left)
        assert not missing, f"never written: {missing[:5]}"
        if len(self._shards) > 1:
            content = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": {name: shard.path.name for name, shard in self._shard_of.items()},
            }
            path = self._directory / f"{SINGLE}.index.json"
            with self._writing(path), path.open("wb") as file:
                file.write((json.dumps(content, indent=2) + "\n").encode())
                _sync(file)

    def close(self) -> None:
        """Close the files of an export that was given up; they are not whole."""
        for file in self._open.values():
            with contextlib.suppress(OSError):
                file.close()
        self._open.clear()

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close()
            if error.errno not in REMEDIES:
                raise
            raise InputError(
                f"{path}: cannot be written ({os.strerror(error.errno)}); the weights take "
                f"{self.total_bytes / 1e9:.3g} GB in all: make room or choose another place, then run the command again"
            ) from error


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _plan(directory: Path, tensors: Sequence[Tensor], shard_bytes: int) -> list[Shard]:
    """Cut the tensors into shards, in their order."""
    groups: list[list[Tensor]] = [[]]
    held = 0
    for tensor in tensors:
        if groups[-1] and held + tensor.num_bytes > shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += tensor.num_bytes
    count = len(groups)
    names = [SINGLE]
    if count > 1:
        names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    return [_shard(directory / name, group) for name, group in zip(names, groups, strict=True)]


def _shard(path: Path, tensors: Sequence[Tensor]) -> Shard:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.num_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    del entries["__metadata__"]
    places = {name: _stored(entry, 8 + len(header)) for name, entry in entries.items()}
    return Shard(path, len(header).to_bytes(8, "little") + header, places)
