"""Token shards: ArrayRecord files with one record a document, its tokens as little-endian integers.

ArrayRecord finds damaged bytes by itself, but neither a file that was cut at a record nor one that is another's; the
SHA-256 in the index finds all of it.
"""

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from lmjax.data.files import REMEDIES, replacing
from lmjax.data.index import Index, ShardEntry
from lmjax.errors import InputError
from lmjax.paths import sha256_of

WRITER_OPTIONS = "group_size:1"
READER_OPTIONS = "readahead_buffer_size:0"
ONE_PASS_OPTIONS = "readahead_buffer_size:1048576,max_parallelism:1"
"""For lengths, from beginning to end: a small buffer and one thread keep memory low."""
MAX_OPEN_SHARDS = 256
FIX = "copy the dataset anew, or delete the directory and run `lmjax data prepare` again"


class ShardSums(NamedTuple):
    """What was written to a shard."""

    documents: int
    tokens: int
    sha256: str


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """The smallest of the two types that hold every token."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def shard_file(split: str, number: int, count: int) -> str:
    """Name of shard ``number`` of ``count`` of a split."""
    return f"{split}-{number:05d}-of-{count:05d}.arrayrecord"


def write_shard(path: str | Path, documents: Iterable[np.ndarray], dtype: str) -> ShardSums:
    """Write one record a document; the file is there whole or not at all. The bytes depend on the documents alone.

    ``documents``: int [length] each, with values that ``dtype`` ("uint16" or "uint32") holds.
    """
    path = Path(path)
    stored = np.dtype(dtype).newbyteorder("<")
    num_documents = num_tokens = 0
    with replacing(path) as unfinished:
        unfinished.write_bytes(b"")  # the writer below is silent about a place that it cannot write to
        with _system_errors():
            writer = ArrayRecordWriter(str(unfinished), WRITER_OPTIONS)
            try:
                for document in documents:
                    writer.write(document.astype(stored, copy=False).tobytes())
                    num_documents += 1
                    num_tokens += len(document)
            finally:
                writer.close()
        sha256 = sha256_of(unfinished)
    return ShardSums(num_documents, num_tokens, sha256)


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """ArrayRecord reports a full disk as a RuntimeError with the system's words in it."""
    try:
        yield
    except RuntimeError as error:
        for number in REMEDIES:
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number)) from error
        raise


class Documents:
    """The documents of a split, by number, in the order of its shards."""

    def __init__(self, directory: str | Path, shards: Sequence[ShardEntry], dtype: str):
        self._directory = Path(directory)
        self._shards = shards
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._readers: dict[int, ArrayRecordReader] = {}
        self._starts = np.cumsum([0, *(shard.documents for shard in shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> np.ndarray:
        """Tokens of document ``number``, [length] of the stored dtype, read-only."""
        return self.read(np.array([number]))[0]

    def read(self, numbers: np.ndarray) -> list[np.ndarray]:
        """The documents of these numbers, in this order. ``numbers``: int [count], each below ``len(self)``."""
        numbers = np.asarray(numbers, np.int64)
        assert ((numbers >= 0) & (numbers < len(self))).all(), "a document number beyond the end of its split"
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        found: list[np.ndarray] = [np.empty(0)] * len(numbers)
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            within = (numbers[places] - self._starts[shard]).tolist()
            with self._reading(self._shards[shard]) as path:
                records = self._reader(int(shard), path).read(within)
            for place, record in zip(places.tolist(), records, strict=True):
                found[place] = np.frombuffer(record, self._dtype)
        return found

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]. The first access reads the split once."""
        lengths = np.empty(len(self), np.int64)
        for shard, entry in enumerate(self._shards):
            with self._reading(entry) as path:
                reader = self._open(path, entry, ONE_PASS_OPTIONS)
                start = self._starts[shard]
                for number in range(entry.documents):
                    lengths[start + number] = len(reader.read()) // self._dtype.itemsize
                reader.close()
        return lengths

    def _reader(self, shard: int, path: Path) -> ArrayRecordReader:
        reader = self._readers.get(shard)
        if reader is None:
            if len(self._readers) >= MAX_OPEN_SHARDS:
                # Dropped, not closed: another thread may be reading from one, and the last to let go closes it.
                self._readers.clear()
            reader = self._readers[shard] = self._open(path, self._shards[shard], READER_OPTIONS)
        return reader

    def _open(self, path: Path, entry: ShardEntry, options: str) -> ArrayRecordReader:
        if not path.is_file():
            raise InputError(f"{path}: the shard is missing; {FIX}")
        reader = ArrayRecordReader(str(path), options)
        if reader.num_records() != entry.documents:
            raise InputError(
                f"{path}: damaged shard: {reader.num_records()} documents where the index has {entry.documents}; {FIX}"
            )
        return reader

    @contextlib.contextmanager
    def _reading(self, entry: ShardEntry) -> Iterator[Path]:
        path = self._directory / entry.file
        try:
            yield path
        except (RuntimeError, IndexError, ValueError) as error:
            raise InputError(f"{path}: damaged shard ({error}); {FIX}") from None


def read_documents(directory: str | Path, index: Index, split: str) -> Documents:
    """Random access to the documents of a split; files are opened when they are first needed."""
    return Documents(directory, [shard for shard in index.shards if shard.split == split], index.token_dtype)


def verify_shards(directory: str | Path, index: Index, split: str) -> None:
    """Compare every shard of a split with the index, byte for byte. Raises InputError that names the first bad one."""
    for shard in index.shards:
        if shard.split != split:
            continue
        path = Path(directory) / shard.file
        if not path.is_file():
            raise InputError(f"{path}: the shard is missing; {FIX}")
        if sha256_of(path) != shard.sha256:
            raise InputError(f"{path}: damaged shard: its SHA-256 is not the one in the index; {FIX}")
