"""Tensors that lie as they are in files of weights, read as views of the mapped files."""

import contextlib
import json
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.lib.array_utils import byte_bounds

from lmjax.errors import InputError


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    """As it is read; bfloat16 and the 8-bit floats are those of ml_dtypes."""
    file: str
    """The name of the file, for messages."""


class Stored(NamedTuple):
    """Where a tensor lies in its file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    """Of its first element from the start of the file, in bytes."""
    strides: tuple[int, ...] | None = None
    """In bytes; None is C order."""


Reader = Callable[[Path], Mapping[str, Stored]]
"""The tensors of one file; raises InputError where the file is not what it should be."""


POINTER = b"version https://git-lfs"


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system says against reading a file of weights into an InputError, and refuse a stand-in for one."""
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER))
        if start == POINTER:
            raise InputError(f"{path}: Git's pointer to the file, not the file; run `git lfs pull` in its repository")
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


class MappedFiles:
    """The tensors of some files. Nothing is copied: a tensor is a read-only view of pages of its file."""

    def __init__(self, files: Iterable[Path], reader: Reader):
        """Raises InputError for a file that cannot be read and for two files that have a tensor of one name."""
        self._maps: dict[str, mmap.mmap] = {}
        self._stored: dict[str, Stored] = {}
        self._recent: tuple[mmap.mmap, int, int] | None = None
        infos: dict[str, TensorInfo] = {}
        for path in files:
            with reading(path):
                found = reader(path)
                with path.open("rb") as file:
                    self._maps[path.name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            for name, stored in found.items():
                if name in infos:
                    raise InputError(
                        f"{path}: {infos[name].file} beside it also has the tensor {name}; fetch both anew"
                    )
                infos[name] = TensorInfo(stored.shape, stored.dtype, path.name)
                self._stored[name] = stored
        self.infos: Mapping[str, TensorInfo] = infos

    def read(self, name: str) -> np.ndarray:
        """A view of the tensor, in the file's dtype; its data may be unaligned."""
        stored = self._stored[name]
        pages = self._maps[self.infos[name].file]
        array = np.ndarray(stored.shape, stored.dtype, buffer=pages, offset=stored.offset, strides=stored.strides)
        low, high = byte_bounds(array)
        self._forget_recent(pages, stored.offset, high - low)
        return array

    def _forget_recent(self, pages: mmap.mmap, offset: int, size: int) -> None:
        """Let go of the pages of the tensor before this one, so that a model larger than memory does not push others
        out. A view of them still works: they are read again."""
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        extent = (pages, start, offset + size - start)
        if self._recent not in (None, extent):
            before, begin, length = self._recent
            if length:
                before.madvise(mmap.MADV_DONTNEED, begin, length)
        self._recent = extent

    def close(self) -> None:
        """Forget the files; their memory is unmapped when the last view of it is gone."""
        self._maps.clear()
        self._recent = None


def open_mapped(directory: Path, single: str, reader: Reader) -> MappedFiles | None:
    """The tensors of the file ``single``, or of the shards that its index names; None where neither is there.

    Raises InputError for what ``reader`` refuses, and for an index that leaves the directory, or does not agree with
    the shards.
    """
    if (directory / single).is_file():
        return MappedFiles([directory / single], reader)
    index = directory / f"{single}.index.json"
    if not index.is_file():
        return None
    where = _read_index(index)
    shards = sorted(set(where.values()))
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise InputError(
            f"{directory}: {len(missing)} of {len(shards)} shards are missing: {_some(missing)}; fetch them"
        )
    files = MappedFiles([directory / shard for shard in shards], reader)
    held = {name: info.file for name, info in files.infos.items()}
    if held != where:
        lacking = [f"{name} ({file})" for name, file in where.items() if held.get(name) != file]
        more = [f"{name} ({file})" for name, file in held.items() if where.get(name) != file]
        parts = [f"the shards lack {_some(lacking)}"] * bool(lacking) + [f"they also have {_some(more)}"] * bool(more)
        raise InputError(f"{index}: does not agree with its shards: {'; '.join(parts)}; fetch all of them anew")
    return files


def _read_index(path: Path) -> dict[str, str]:
    """The shard of each tensor."""
    try:
        with reading(path):
            where = json.loads(path.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not an index of shards ({error!r}); fetch it anew") from None
    if not (isinstance(where, dict) and where and all(isinstance(file, str) for file in where.values())):
        raise InputError(f"{path}: weight_map has to name a file for each tensor; fetch the index anew")
    for name, file in where.items():
        if len(PurePosixPath(file).parts) != 1 or file == "..":
            raise InputError(f"{path}: {name} is said to be in {file!r}; a shard has to lie beside its index")
    return where


def _some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
