"""What is in a dataset: counts, lengths, what each way of packing costs, and rows as text."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from lmjax.data.index import Index
from lmjax.data.plans import PACKERS, build_plan
from lmjax.data.shards import read_documents
from lmjax.data.tokenizer import load_tokenizer

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class SplitSummary(NamedTuple):
    """The documents of a split."""

    split: str
    shards: int
    documents: int
    tokens: int
    """With BOS and EOS."""
    tokens_per_document: dict[str, int]
    """Quantile ("0.5") -> tokens: the shortest length that this part of the documents does not exceed."""


class PackingSummary(NamedTuple):
    """What one way of packing makes of a split."""

    split: str
    packing: str
    sequence_length: int
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


def summarize_splits(directory: str, index: Index) -> list[SplitSummary]:
    """One entry a split, in the order of the index."""
    summaries = []
    for split in dict.fromkeys(shard.split for shard in index.shards):
        lengths = read_documents(directory, index, split).lengths
        quantiles = np.quantile(lengths, QUANTILES, method="inverted_cdf") if len(lengths) else []
        summaries.append(
            SplitSummary(
                split=split,
                shards=sum(shard.split == split for shard in index.shards),
                documents=len(lengths),
                tokens=int(np.sum(lengths, dtype=np.int64)),
                tokens_per_document={
                    str(part): int(length) for part, length in zip(QUANTILES, quantiles, strict=False)
                },
            )
        )
    return summaries


def summarize_packing(directory: str, index: Index, sequence_length: int) -> list[PackingSummary]:
    """Every way of packing beside the others, for each split; nothing is written."""
    summaries = []
    for split in dict.fromkeys(shard.split for shard in index.shards):
        for packing in PACKERS:
            plan = build_plan(directory, index, split=split, sequence_length=sequence_length, packing=packing)
            positions = plan.num_rows * sequence_length
            summaries.append(
                PackingSummary(
                    split=split,
                    packing=packing,
                    sequence_length=sequence_length,
                    rows=plan.num_rows,
                    padding=plan.padding,
                    padding_fraction=plan.padding / positions if positions else 0.0,
                    documents_cut=plan.documents_cut,
                    lost_targets=plan.lost_targets,
                )
            )
    return summaries


def sample_rows(
    directory: str, index: Index, *, split: str, sequence_length: int, packing: str, num_rows: int
) -> list[list[SamplePiece]]:
    """Rows spread evenly over a plan, each as its pieces in order, decoded without BOS and EOS."""
    plan = build_plan(directory, index, split=split, sequence_length=sequence_length, packing=packing)
    tokenizer = load_tokenizer(directory)
    documents = read_documents(directory, index, split)
    special = {tokenizer.bos_id, tokenizer.eos_id}
    samples = []
    for row in np.unique(np.linspace(0, plan.num_rows - 1, min(num_rows, plan.num_rows)).astype(np.int64)):
        pieces = plan.layout.pieces[plan.layout.row_starts[row] : plan.layout.row_starts[row + 1]]
        tokens = documents.read(pieces["document"])
        samples.append(
            [
                SamplePiece(
                    document=document,
                    start=start,
                    length=length,
                    document_length=len(whole),
                    text=tokenizer.decode([t for t in whole[start : start + length].tolist() if t not in special]),
                )
                for (document, start, length), whole in zip(pieces.tolist(), tokens, strict=True)
            ]
        )
    return samples


def planned_sequence_lengths(directory: str) -> list[int]:
    """Sequence lengths for which the dataset directory holds pack plans, ascending."""
    return sorted({int(file.stem.rpartition("-")[2]) for file in Path(directory).glob("plan-*.json")})
