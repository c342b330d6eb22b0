"""From made parts to shards: duplicates dropped, documents split, in one process and in the corpus's order."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lmjax.data.config import DataConfig
from lmjax.data.files import sha256_of
from lmjax.data.index import ShardEntry
from lmjax.data.parts import load_digests, load_part
from lmjax.data.shards import shard_name, write_shard

SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Merged:
    """What became of the parts."""

    shards: tuple[ShardEntry, ...]
    token_counts: list[int]
    num_duplicates: int
    num_empty: int
    skipped_files: list[str]


def split_of(digests: np.ndarray, validation_fraction: float) -> np.ndarray:
    """Index into SPLITS of each document: by its text's digest, so that it stays where it is when text is added."""
    place = np.ascontiguousarray(digests[:, :8]).view("<u8")[:, 0] / 2.0**64
    return (place < validation_fraction).astype(np.int8)


def merge(parts: Sequence[Path], directory: Path, config: DataConfig, vocab_size: int) -> Merged:
    """Write the shards of both splits into ``directory``. Memory: a digest a document, and one part."""
    kept, num_duplicates = _first_of_each(parts)
    num_empty, skipped = 0, []
    counts = np.zeros(vocab_size, np.int64)
    entries: list[ShardEntry] = []
    for split_index, split in enumerate(SPLITS):

        def documents(split_index: int = split_index) -> Iterator[np.ndarray]:
            nonlocal num_empty
            for path, keep in zip(parts, kept, strict=True):
                part = load_part(path)
                wanted = keep & (split_of(part.digests, config.validation_fraction) == split_index)
                if split_index == 0:
                    num_empty += part.num_empty
                    skipped.extend(part.skipped)
                    counts[:] += _target_counts(part.tokens, part.lengths, wanted, vocab_size)
                for document, take in zip(part.documents(), wanted.tolist(), strict=True):
                    if take:
                        yield document

        entries += _write_shards(documents(), split, directory, config.shard_tokens)
    return Merged(tuple(entries), counts.tolist(), num_duplicates, num_empty, skipped)


def _first_of_each(parts: Sequence[Path]) -> tuple[list[np.ndarray], int]:
    """For each part, which documents no earlier one equals; and how many do."""
    seen: set[bytes] = set()
    kept, num_duplicates = [], 0
    for path in parts:
        digests = load_digests(path)
        keep = np.zeros(len(digests), bool)
        for number, digest in enumerate(map(bytes, digests)):
            keep[number] = digest not in seen
            seen.add(digest)
        num_duplicates += int(np.count_nonzero(~keep))
        kept.append(keep)
    return kept, num_duplicates


def _target_counts(tokens: np.ndarray, lengths: np.ndarray, wanted: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each token is a target in the wanted documents: everywhere but at their first place."""
    is_target = np.repeat(wanted, lengths)
    is_target[(np.cumsum(lengths) - lengths)[lengths > 0]] = False
    return np.bincount(tokens[is_target], minlength=vocab_size)


class _Shard:
    """Documents from ``source`` until there are ``limit`` tokens or none is left, counted as they are written."""

    def __init__(self, source: Iterator[np.ndarray], first: np.ndarray, limit: int):
        self.num_documents = self.num_tokens = 0
        self._source, self._first, self._limit = source, first, limit

    def __iter__(self) -> Iterator[np.ndarray]:
        document: np.ndarray | None = self._first
        while document is not None:
            self.num_documents += 1
            self.num_tokens += len(document)
            yield document
            document = next(self._source, None) if self.num_tokens < self._limit else None


def _write_shards(documents: Iterator[np.ndarray], split: str, directory: Path, limit: int) -> list[ShardEntry]:
    written: list[tuple[Path, _Shard]] = []
    while (first := next(documents, None)) is not None:
        path = directory / f".{split}-{len(written):05d}.partial"
        shard = _Shard(documents, first, limit)
        write_shard(path, shard)
        written.append((path, shard))
    entries = []
    for number, (path, shard) in enumerate(written):
        final = directory / shard_name(split, number, len(written))
        path.replace(final)
        entries.append(ShardEntry(final.name, split, shard.num_documents, shard.num_tokens, sha256_of(final)))
    return entries
