"""Batches as a pure function of (dataset, seed, step): there is no iterator, hence no state to save or to lose."""

import bisect
import functools
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from lmjax.data.index import Index, fingerprint
from lmjax.data.mixture import Mixture, Schedule, Stage
from lmjax.data.plans import Plan
from lmjax.data.shards import read_documents
from lmjax.errors import InputError

EMPTY_ROW = -1
"""Row number of a row that holds no token."""


class Batch(NamedTuple):
    """Rows of packed documents; every array is [rows, sequence_length]."""

    tokens: np.ndarray
    """int32; 0 where there is no document."""
    targets: np.ndarray
    """int32: the next token of the same piece; 0 where there is none."""
    segment_ids: np.ndarray
    """int32: 1, 2, … number the pieces of a row; 0 is padding."""
    positions: np.ndarray
    """int32: 0, 1, … from the start of each piece; 0 in padding."""
    weights: np.ndarray
    """float32: 1 where there is a target, else 0."""


_DTYPES = (np.int32, np.int32, np.int32, np.int32, np.float32)


class RowReader:
    """Reads rows of a plan by number, each with one random access a piece."""

    def __init__(self, directory: str, index: Index, plan: Plan):
        assert plan.dataset == fingerprint(index), "the plan was verified against this dataset when it was loaded"
        self._documents = read_documents(directory, index.of_source(plan.source), plan.split)
        self._layout = plan.layout
        self._sequence_length = plan.sequence_length

    def read(self, rows: np.ndarray) -> Batch:
        """The rows of these numbers, in this order; ``EMPTY_ROW`` gives padding alone. ``rows``: int64 [num_rows]."""
        shape = (len(rows), self._sequence_length)
        tokens, targets, segment_ids, positions, weights = (np.zeros(shape, dtype) for dtype in _DTYPES)
        pieces, lines = self._pieces(rows)
        # A document that was cut has many pieces; each record is read once.
        numbers, which = np.unique(pieces["document"], return_inverse=True)
        found = self._documents.read(numbers)
        line, segment, offset = -1, 0, 0
        for piece_line, (_, start, length), number in zip(lines.tolist(), pieces.tolist(), which.tolist(), strict=True):
            if piece_line != line:
                line, segment, offset = piece_line, 0, 0
            segment += 1
            here, end = slice(offset, offset + length), offset + length
            tokens[line, here] = found[number][start : start + length]
            targets[line, offset : end - 1] = tokens[line, offset + 1 : end]
            weights[line, offset : end - 1] = 1
            segment_ids[line, here] = segment
            positions[line, here] = np.arange(length)
            offset = end
        return Batch(tokens, targets, segment_ids, positions, weights)

    def _pieces(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The pieces of the rows, in order, and for each the line of the batch that it lies in."""
        full = np.flatnonzero(rows != EMPTY_ROW)
        first, stop = self._layout.row_starts[rows[full]], self._layout.row_starts[rows[full] + 1]
        counts = stop - first
        lines = np.repeat(full, counts)
        within = np.arange(len(lines)) - np.repeat(np.cumsum(counts) - counts, counts)
        return self._layout.pieces[np.repeat(first, counts) + within], lines


class Batches:
    """Endless global batches of the shuffled training split.

    A plan's rows make an endless stream of epochs, each of which holds every row once in an order of its own. Global
    batch ``step`` takes ``global_batch_size`` rows from that stream, or, where sources are mixed, from the streams of
    the sources by turns as the weights ask; a batch may span epochs. Batch and order depend on the dataset, the plans'
    options, the mixture, the seed and the step, and on nothing else.
    """

    def __init__(
        self,
        directory: str,
        index: Index,
        plans: Sequence[Plan],
        *,
        global_batch_size: int,
        seed: int,
        mixture: Mixture | None = None,
        steps: int | None = None,
    ):
        """``plans``: one of all documents, or one of each source of the ``mixture``. ``steps``: of the whole run.

        Raises InputError for a plan without rows, and for a source that would be seen more often in these steps than
        its ``epochs`` allow.
        """
        if global_batch_size < 1:
            raise InputError(f"global_batch_size: found {global_batch_size}; at least 1 sequence is needed")
        for plan in plans:
            if plan.num_rows == 0:
                of = "" if plan.source is None else f" of source {plan.source!r}"
                raise InputError(f"{directory}: split {plan.split!r} has no documents{of}; prepare more text")
        assert [plan.source for plan in plans] == ([None] if mixture is None else [*mixture.sources])
        self.num_rows = sum(plan.num_rows for plan in plans)
        self.global_batch_size = global_batch_size
        self._plans = plans
        self._mixture = mixture
        self._readers = [RowReader(directory, index, plan) for plan in plans]
        self._orders = [EpochOrder(plan.num_rows, _seed_of(plan.source, seed)) for plan in plans]
        stages = (Stage(0, (1.0,)),) if mixture is None else mixture.stages
        self._schedule = Schedule(stages, global_batch_size)
        if mixture is not None and steps is not None:
            self._check_epochs(mixture, steps)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows ``start`` to ``stop`` (exclusive) of global batch ``step``, which is counted from 0."""
        sources, numbers = self._find(step, start, stop)
        if len(self._readers) == 1:
            return self._readers[0].read(numbers)
        length = self._plans[0].sequence_length
        batch = Batch(*(np.zeros((stop - start, length), dtype) for dtype in _DTYPES))
        for source in np.unique(sources):
            here = sources == source
            for field, part in zip(batch, self._readers[source].read(numbers[here]), strict=True):
                field[here] = part
        return batch

    def row_numbers(self, step: int, start: int, stop: int) -> np.ndarray:
        """Which rows of the plan of their source these are, int64 [stop - start]."""
        return self._find(step, start, stop)[1]

    def mixture(self, step: int) -> dict[str, int]:
        """Rows of each source in global batch ``step``; empty where no sources are mixed."""
        if self._mixture is None:
            return {}
        counts = self._schedule.count(step + 1) - self._schedule.count(step)
        return dict(zip(self._mixture.sources, counts.tolist(), strict=True))

    def mixture_tokens(self, step: int) -> dict[str, int]:
        """Tokens of each source in global batch ``step``; empty where no sources are mixed."""
        if self._mixture is None:
            return {}
        sources, numbers = self._find(step, 0, self.global_batch_size)
        return {
            name: self._plans[source].tokens_of(numbers[sources == source])
            for source, name in enumerate(self._mixture.sources)
        }

    def hash(self, step: int) -> str:
        """SHA-256 of the tokens, then the segment ids, of the whole global batch (little-endian int32, row by row)."""
        batch = self.rows(step, 0, self.global_batch_size)
        digest = hashlib.sha256(batch.tokens.astype("<i4").tobytes())
        digest.update(batch.segment_ids.astype("<i4").tobytes())
        return digest.hexdigest()

    def _find(self, step: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each row, and its number in that source's plan: both int64 [stop - start]."""
        assert step >= 0
        assert 0 <= start <= stop <= self.global_batch_size
        sources, places = self._schedule.find(step, start, stop)
        pairs = zip(sources.tolist(), places.tolist(), strict=True)
        return sources, np.array([self._orders[source][place] for source, place in pairs], np.int64)

    def _check_epochs(self, mixture: Mixture, steps: int) -> None:
        needed = self._schedule.count(steps).tolist()
        lines = [
            f"  {plan.source}: {rows:,} rows are needed, and {epochs} x {plan.num_rows:,} = "
            f"{epochs * plan.num_rows:,} are there: it ends in step {self._end(number, epochs * plan.num_rows, steps)}"
            for number, (plan, epochs, rows) in enumerate(zip(self._plans, mixture.epochs, needed, strict=True))
            if epochs is not None and rows > epochs * plan.num_rows
        ]
        if lines:
            raise InputError(
                f"data.sources: the mixture ends before the run's last step. Of {steps:,} steps x "
                f"{self.global_batch_size:,} = {steps * self.global_batch_size:,} rows:\n"
                + "\n".join(lines)
                + "\nRaise its epochs, lower its weight, train fewer steps, or prepare more of its text."
            )

    def _end(self, source: int, num_rows: int, steps: int) -> int:
        """The first of the steps, counted from 1, that needs more than so many rows of a source."""
        return 1 + bisect.bisect_left(
            range(steps), num_rows + 1, key=lambda step: int(self._schedule.count(step + 1)[source])
        )


class EvaluationBatches:
    """Rows of a split once, in the order of the plan; the last batch is filled with empty rows."""

    def __init__(
        self, directory: str, index: Index, plan: Plan, *, global_batch_size: int, max_rows: int | None = None
    ):
        """At most ``max_rows`` rows, evenly spread over the split: the first ones may all be of its first source."""
        assert global_batch_size >= 1
        self.num_rows = plan.num_rows if max_rows is None else min(max_rows, plan.num_rows)
        self.global_batch_size = global_batch_size
        self.num_batches = -(-self.num_rows // global_batch_size)
        self._chosen = np.arange(self.num_rows, dtype=np.int64) * plan.num_rows // max(self.num_rows, 1)
        self._reader = RowReader(directory, index, plan)

    def rows(self, number: int, start: int, stop: int) -> Batch:
        """Rows ``start`` to ``stop`` (exclusive) of global batch ``number``, which is counted from 0."""
        assert 0 <= number < self.num_batches
        assert 0 <= start <= stop <= self.global_batch_size
        places = np.arange(start, stop) + number * self.global_batch_size
        rows = np.full(len(places), EMPTY_ROW, np.int64)
        there = places < self.num_rows
        rows[there] = self._chosen[places[there]]
        return self._reader.read(rows)


class EpochOrder:
    """Row number at each place of an endless stream of epochs, in O(1) memory: grain's index shuffle, anew each epoch.

    The seed of an epoch is a hash of the run's seed and the epoch's number. Grain itself adds the two, so that there
    the runs of seeds 0 and 1 share all but one epoch.
    """

    def __init__(self, num_rows: int, seed: int):
        self._num_rows = num_rows
        self._seed = seed

    def __getitem__(self, place: int) -> int:
        epoch, within = divmod(place, self._num_rows)
        row = _shuffled(self._num_rows, self._seed, epoch)[within]
        assert row is not None, "only a filtered dataset has holes"
        return row


def _seed_of(source: str | None, seed: int) -> int:
    """A seed of its own for each source of a mixture: two of equal size would else have one order."""
    if source is None:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{source}".encode()).digest()[:8], "little")


@functools.lru_cache(maxsize=64)
def _shuffled(num_rows: int, seed: int, epoch: int) -> grain.MapDataset[int]:
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return grain.MapDataset.range(num_rows).shuffle(seed=int.from_bytes(digest[:4], "little"))
