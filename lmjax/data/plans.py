"""Pack plans on disk: which piece of which document lies in which row, kept in the dataset directory."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmjax.data.config import DataConfig
from lmjax.data.files import replacing, write_bytes
from lmjax.data.index import Index, fingerprint
from lmjax.data.pack import Layout, best_fit_decreasing, concat
from lmjax.data.shards import read_documents
from lmjax.errors import InputError
from lmjax.paths import sha256_of

FORMAT_VERSION = 1
PACKERS: Mapping[str, Callable[[np.ndarray, int], Layout]] = {"best_fit": best_fit_decreasing, "concat": concat}


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rows of one split of one dataset, and how they were made."""

    dataset: str
    """Fingerprint of the dataset whose documents the pieces are of."""
    split: str
    sequence_length: int
    """Positions a row."""
    packing: str
    layout: Layout
    """Memory-mapped where the plan was read from disk."""
    padding: int
    """Positions of all rows that hold no token."""
    documents_cut: int
    """Documents that lie in more than one piece."""
    lost_targets: int
    """Tokens that are no target in their row because a cut parts them from the token before."""
    source: str | None = None
    """The source whose documents alone the rows hold, numbered from its first; None is all of the split."""

    @property
    def num_rows(self) -> int:
        return self.layout.num_rows

    def tokens_of(self, rows: np.ndarray) -> int:
        """Tokens in the rows of these numbers, int [count]."""
        edges = self.layout.row_starts
        return sum(int(self.layout.pieces["length"][edges[row] : edges[row + 1]].sum()) for row in rows.tolist())


class Plans(NamedTuple):
    """The rows that a config's runs go through."""

    train: tuple[Plan, ...]
    """One of all documents, or one of each source of a mixture, in its order."""
    validation: Plan | None
    """Of all documents; None where none was held out."""


def build_plan(
    index: Index, lengths: np.ndarray, *, split: str, sequence_length: int, packing: str, source: str | None = None
) -> Plan:
    """Pack the documents of a split, or of one source in it, whose tokens ``lengths`` counts, without writing it."""
    if packing not in PACKERS:
        raise InputError(f"packing: found {packing!r}; allowed are {', '.join(PACKERS)}")
    if sequence_length < 2:
        raise InputError(f"sequence_length: found {sequence_length}; a row needs at least 2 positions to have a target")
    layout = PACKERS[packing](lengths, sequence_length)
    return Plan(
        dataset=fingerprint(index),
        split=split,
        sequence_length=sequence_length,
        packing=packing,
        layout=layout,
        padding=layout.padding(sequence_length),
        documents_cut=layout.documents_cut,
        lost_targets=layout.lost_targets,
        source=source,
    )


def stored_plans(directory: str) -> list[tuple[int, str]]:
    """Sequence length and packing of the training split's plans that are in a dataset directory, ascending."""
    pattern = rf"plan-train(?:\.[^.]+)?-({'|'.join(PACKERS)})-(\d+)\.json"
    names = (re.fullmatch(pattern, file.name) for file in Path(directory).iterdir())
    return sorted({(int(name[2]), name[1]) for name in names if name})


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def ensure_plans(
    data: DataConfig,
    index: Index,
    announce: Callable[[str], None] = _say,
    lengths: Mapping[str, np.ndarray] | None = None,
) -> Plans:
    """The plans that a config needs, each as ``ensure_plan`` gives it."""

    def plan(split: str, source: str | None = None) -> Plan:
        return ensure_plan(
            data.path,
            index,
            split=split,
            sequence_length=data.sequence_length,
            packing=data.packing,
            source=source,
            announce=announce,
            lengths=lengths,
        )

    sources = (None,) if data.mixture is None else data.mixture.sources
    return Plans(
        train=tuple(plan("train", source) for source in sources),
        validation=plan("validation") if "validation" in index.splits else None,
    )


def ensure_plan(
    directory: str,
    index: Index,
    *,
    split: str,
    sequence_length: int,
    packing: str,
    source: str | None = None,
    announce: Callable[[str], None] = _say,
    lengths: Mapping[str, np.ndarray] | None = None,
) -> Plan:
    """The stored plan, verified; a missing one is built first, stored atomically and announced.

    ``lengths``: tokens of each document of every shard, int64 [documents], by the shard's file; who wrote them just
    now has them, and without them the split is read. Building is deterministic, so processes that share the directory may all call this; it saves work to let one go
    first. A plan that does not match its checksums, or that is of another dataset, is an ``InputError``.
    """
    files = _files(directory, split, source, sequence_length, packing)
    if not all(file.exists() for file in files):
        announce(f"building the pack plan {files[0]} (split {split}, {packing}, rows of {sequence_length} tokens)")
        dataset = index.of_source(source)
        if lengths is None:
            to_pack = read_documents(directory, dataset, split).lengths
        else:
            found = [lengths[shard.file] for shard in dataset.shards if shard.split == split]
            to_pack = np.concatenate([np.empty(0, np.int64), *found])  # a source may have no document in a split
        plan = build_plan(index, to_pack, split=split, sequence_length=sequence_length, packing=packing, source=source)
        _write(plan, *files)
    return _read(fingerprint(index), split, source, sequence_length, packing, *files)


def _files(
    directory: str, split: str, source: str | None, sequence_length: int, packing: str
) -> tuple[Path, Path, Path]:
    part = split if source is None else f"{split}.{source}"
    stem = Path(directory) / f"plan-{part}-{packing}-{sequence_length}"
    return Path(f"{stem}.json"), Path(f"{stem}.pieces.npy"), Path(f"{stem}.rows.npy")


def _write(plan: Plan, sidecar: Path, pieces: Path, row_starts: Path) -> None:
    """Store the arrays, then the sidecar that vouches for them: a kill leaves the plan missing, never wrong."""
    sidecar.unlink(missing_ok=True)
    for path, array in ((pieces, plan.layout.pieces), (row_starts, plan.layout.row_starts)):
        with replacing(path) as unfinished, unfinished.open("wb") as file:
            np.save(file, array)
    record = {
        "format_version": FORMAT_VERSION,
        "dataset": plan.dataset,
        "split": plan.split,
        **({} if plan.source is None else {"source": plan.source}),
        "sequence_length": plan.sequence_length,
        "packing": plan.packing,
        "rows": plan.num_rows,
        "pieces": len(plan.layout.pieces),
        "tokens": plan.layout.num_tokens,
        "padding": plan.padding,
        "documents_cut": plan.documents_cut,
        "lost_targets": plan.lost_targets,
        "sha256": {file.name: sha256_of(file) for file in (pieces, row_starts)},
    }
    write_bytes(sidecar, json.dumps(record, indent=1).encode() + b"\n")


def _read(
    dataset: str,
    split: str,
    source: str | None,
    sequence_length: int,
    packing: str,
    sidecar: Path,
    pieces: Path,
    row_starts: Path,
) -> Plan:
    fix = f"delete {sidecar} and run the command again: the plan is rebuilt from the shards"
    try:
        record = json.loads(sidecar.read_bytes())
        stored = {file: record["sha256"][file.name] for file in (pieces, row_starts)}
        found = [record[key] for key in ("format_version", "dataset", "split", "sequence_length", "packing")]
        found.append(record.get("source"))
        counts = {key: int(record[key]) for key in ("padding", "documents_cut", "lost_targets")}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{sidecar}: not a pack plan ({error!r}); {fix}") from None
    expected = [FORMAT_VERSION, dataset, split, sequence_length, packing, source]
    if found != expected:
        raise InputError(f"{sidecar}: found a plan of {found}, where {expected} is needed (format, dataset, …); {fix}")
    for file, sha256 in stored.items():
        if sha256_of(file) != sha256:
            raise InputError(
                f"{file}: its bytes are not those that {sidecar.name} vouches for (SHA-256 differs); {fix}"
            )
    layout = Layout(np.load(pieces, mmap_mode="r"), np.load(row_starts, mmap_mode="r"))
    return Plan(
        dataset=dataset,
        split=split,
        sequence_length=sequence_length,
        packing=packing,
        layout=layout,
        source=source,
        **counts,
    )
