"""From parts to shards: of equal documents the first stays, the others are left out, and what stays is written."""

import collections
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmjax.data.files import write_bytes
from lmjax.data.index import ShardEntry
from lmjax.data.parts import SPLITS, Volume, read_tokens
from lmjax.data.shards import shard_file, write_shard

SHARDS, MIN_SHARD_BYTES = 16, 2**23
"""Into so many shards a dataset is cut before these reach the size that is asked for, if each has so many bytes: several
processes write them at once."""
COUNTED_TOKENS = 2**17
"""How many tokens are counted at a time: each takes 8 bytes for a moment."""


class Take(NamedTuple):
    """Documents of one volume of a part that go to one shard."""

    path: str
    """The volume's file."""
    key: str
    """The volume's key."""
    numbers: np.ndarray
    """int64: which of the documents of the volume's split, ascending."""


class ShardJob(NamedTuple):
    """A shard to be written."""

    directory: str
    file: str
    split: str
    source: str | None
    """The name of the source that all documents are of; None where sources have none."""
    takes: tuple[Take, ...]
    dtype: str
    vocab_size: int

    @property
    def key(self) -> str:
        """Digest of all that the shard's bytes depend on."""
        digest = hashlib.sha256(f"{self.file} {self.dtype} {self.vocab_size}".encode())
        for take in self.takes:
            digest.update(take.key.encode() + take.numbers.astype("<i8").tobytes())
        return digest.hexdigest()


class MadeShard(NamedTuple):
    """What was written."""

    entry: ShardEntry
    token_counts: np.ndarray
    """int64 [vocab_size]: how often each token is a target, in all places of a document but the first."""


class Selection(NamedTuple):
    """What becomes of the parts' documents."""

    jobs: list[ShardJob]
    lengths: list[np.ndarray]
    """int64 [documents] of each job: tokens of the documents that its shard will hold, in their order."""
    duplicates: int
    """Documents that are left out."""


def select(volumes: Sequence[Volume], *, directory: Path, shard_bytes: int, dtype: str, vocab_size: int) -> Selection:
    """Share out all documents but duplicates, in the order of the volumes, over shards of about ``shard_bytes``, or of
    less where there would be few of them.

    Sources with names have shards of their own. Memory: the digest of every document, twice for a moment, its length and
    its number.
    """
    jobs, lengths_of_jobs = [], []
    duplicates = 0
    lengths_of_volumes = {split: [volume.splits[split].lengths for volume in volumes] for split in SPLITS}
    itemsize = np.dtype(dtype).itemsize
    total = itemsize * sum(int(lengths.sum()) for of_split in lengths_of_volumes.values() for lengths in of_split)
    shard_tokens = max(min(shard_bytes, max(total // SHARDS, MIN_SHARD_BYTES)) // itemsize, 1)
    for split in SPLITS:
        shards: dict[str | None, dict[int, list[tuple[Take, np.ndarray]]]] = {}
        tokens_before: dict[str | None, int] = collections.defaultdict(int)
        is_first = _first_of_equals(np.concatenate([volume.splits[split].digests for volume in volumes]))
        for volume, lengths in zip(volumes, lengths_of_volumes[split], strict=True):
            here, is_first = np.split(is_first, [len(lengths)])
            kept = np.flatnonzero(here)
            duplicates += len(lengths) - len(kept)
            starts = tokens_before[volume.source] + np.cumsum(lengths[kept]) - lengths[kept]
            tokens_before[volume.source] += int(lengths[kept].sum())
            of_source = shards.setdefault(volume.source, {})
            for shard in np.unique(starts // shard_tokens).tolist():
                numbers = kept[starts // shard_tokens == shard]
                taken = Take(volume.path, volume.key, numbers), lengths[numbers]
                of_source.setdefault(shard, []).append(taken)
        for source, of_source in shards.items():
            for number, taken_here in enumerate(of_source.values()):
                takes, lengths_taken = zip(*taken_here, strict=True)
                file = shard_file(split if source is None else f"{split}.{source}", number, len(of_source))
                jobs.append(ShardJob(str(directory), file, split, source, takes, dtype, vocab_size))
                lengths_of_jobs.append(np.concatenate(lengths_taken))
    return Selection(jobs, lengths_of_jobs, duplicates)


def make_shard(job: ShardJob) -> MadeShard:
    """Write a shard, and beside it a record of what is in it; do nothing where that record is there."""
    record = Path(job.directory) / f"{job.file}.json"
    if record.exists():
        content = json.loads(record.read_bytes())
        if content["key"] == job.key:
            return MadeShard(ShardEntry(**content["entry"]), np.array(content["token_counts"], np.int64))
    counts = np.zeros(job.vocab_size, np.int64)
    sums = write_shard(Path(job.directory) / job.file, _documents(job, counts), job.dtype)
    entry: dict[str, Any] = {"file": job.file, "split": job.split, **sums._asdict(), "source": job.source}
    content = {"key": job.key, "entry": entry, "token_counts": counts.tolist()}
    write_bytes(record, json.dumps(content).encode())
    return MadeShard(ShardEntry(**entry), counts)


def _first_of_equals(digests: np.ndarray) -> np.ndarray:
    """bool [documents]: those that no earlier one equals. ``digests``: uint8 [documents, 16]."""
    halves = digests.view(np.uint64)
    order = np.lexsort(halves.T)  # stable: of equals, the first comes first
    same = np.ones(max(len(order) - 1, 0), bool)
    for half in halves.T:
        ordered = half[order]
        same &= ordered[1:] == ordered[:-1]
    is_first = np.ones(len(order), bool)
    is_first[order[1:][same]] = False
    return is_first


def _documents(job: ShardJob, counts: np.ndarray) -> Iterator[np.ndarray]:
    """The documents of a shard; ``counts`` is raised by their targets, some documents at a time."""
    targets: list[np.ndarray] = []
    num_targets = 0
    for take in job.takes:
        tokens, lengths = read_tokens(take.path, job.split)
        ends = np.cumsum(lengths)
        for number in take.numbers.tolist():
            document = tokens[ends[number] - lengths[number] : ends[number]]
            targets.append(document[1:])
            num_targets += len(document) - 1
            if num_targets >= COUNTED_TOKENS:
                counts += np.bincount(np.concatenate(targets), minlength=job.vocab_size)
                targets, num_targets = [], 0
            yield document
    if targets:
        counts += np.bincount(np.concatenate(targets), minlength=job.vocab_size)
