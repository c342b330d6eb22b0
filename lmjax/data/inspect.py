"""What is in a dataset: counts, lengths, what each way of packing costs, and rows as text."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lmjax.data.index import Index
from lmjax.data.plans import PACKERS, Plan, build_plan
from lmjax.data.shards import Documents, read_documents
from lmjax.data.tokenizer import Tokenizer, load_tokenizer

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class SplitSummary(NamedTuple):
    """The documents of a split, or of one source in it."""

    split: str
    source: str | None
    """None is all of the split."""
    shards: int
    documents: int
    tokens: int
    """With BOS and EOS."""
    tokens_per_document: dict[str, int]
    """Quantile ("0.5") -> tokens: the shortest length that this part of the documents does not exceed."""


class PackingSummary(NamedTuple):
    """What one way of packing makes of a split, or of one source in it."""

    split: str
    source: str | None
    """None is all of the split."""
    sequence_length: int
    packing: str
    rows: int
    padding: int
    """Positions without a token."""
    padding_fraction: float
    """Of all positions."""
    documents_cut: int
    lost_targets: int


class SamplePiece(NamedTuple):
    """A piece of a row, as text."""

    document: int
    """Number in the split."""
    start: int
    """Token of the document at which the piece begins."""
    length: int
    """Tokens."""
    document_length: int
    """Tokens of the whole document."""
    text: str
    """Special tokens have none."""


class Inspection(NamedTuple):
    """All that is shown of a dataset."""

    splits: list[SplitSummary]
    packing: list[PackingSummary]
    """Every way of packing beside the others, for each sequence length, split and source."""
    samples: list[list[SamplePiece]]
    """Rows of the training split for the first sequence length, each as its pieces in order: spread evenly over those
    that hold several pieces, if there are any."""


def inspect_dataset(
    directory: str, index: Index, *, sequence_lengths: Sequence[int], packing: str, num_samples: int
) -> Inspection:
    """Read each split once, and write nothing. ``packing`` is that of the samples."""
    documents = {split: read_documents(directory, index, split) for split in index.splits}
    groups = [
        (split, source, lengths)
        for split in documents
        for source, lengths in _by_source(index, split, documents[split].lengths)
    ]
    summaries = []
    samples = []
    for sequence_length in sequence_lengths:
        for split, source, lengths in groups:
            for method in PACKERS:
                plan = build_plan(
                    index, lengths, split=split, sequence_length=sequence_length, packing=method, source=source
                )
                summaries.append(_packing_summary(plan))
                shown = (sequence_length, split, source, method)
                if num_samples and shown == (sequence_lengths[0], "train", None, packing):
                    samples = _sample_rows(documents[split], plan, load_tokenizer(directory), num_samples)
    return Inspection([_split_summary(index, *group) for group in groups], summaries, samples)


def _by_source(index: Index, split: str, lengths: np.ndarray) -> Iterator[tuple[str | None, np.ndarray]]:
    """The lengths of all documents of a split, then those of each source: their documents follow one another."""
    yield None, lengths
    first = 0
    for source in index.sources(split):
        count = sum(shard.documents for shard in index.shards if (shard.split, shard.source) == (split, source))
        yield source, lengths[first : first + count]
        first += count


def _split_summary(index: Index, split: str, source: str | None, lengths: np.ndarray) -> SplitSummary:
    quantiles = np.quantile(lengths, QUANTILES, method="inverted_cdf").tolist() if len(lengths) else []
    return SplitSummary(
        split=split,
        source=source,
        shards=sum(shard.split == split for shard in index.of_source(source).shards),
        documents=len(lengths),
        tokens=int(lengths.sum()),
        tokens_per_document={str(part): length for part, length in zip(QUANTILES, quantiles, strict=False)},
    )


def _packing_summary(plan: Plan) -> PackingSummary:
    positions = plan.num_rows * plan.sequence_length
    return PackingSummary(
        split=plan.split,
        source=plan.source,
        sequence_length=plan.sequence_length,
        packing=plan.packing,
        rows=plan.num_rows,
        padding=plan.padding,
        padding_fraction=plan.padding / positions if positions else 0.0,
        documents_cut=plan.documents_cut,
        lost_targets=plan.lost_targets,
    )


def _sample_rows(documents: Documents, plan: Plan, tokenizer: Tokenizer, num_rows: int) -> list[list[SamplePiece]]:
    samples = []
    rows = np.flatnonzero(np.diff(plan.layout.row_starts) > 1)
    if len(rows) == 0:
        rows = np.arange(plan.num_rows)
    for row in rows[np.linspace(0, len(rows) - 1, min(num_rows, len(rows))).astype(np.int64)]:
        pieces = plan.layout.pieces[plan.layout.row_starts[row] : plan.layout.row_starts[row + 1]]
        samples.append(
            [
                SamplePiece(
                    document=document,
                    start=start,
                    length=length,
                    document_length=len(whole),
                    text=tokenizer.decode(whole[start : start + length].tolist()),
                )
                for (document, start, length), whole in zip(
                    pieces.tolist(), documents.read(pieces["document"]), strict=True
                )
            ]
        )
    return samples
