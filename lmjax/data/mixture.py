"""Weighted mixtures: which row of which source stands at each place of the stream of batches, in closed form.

The rows of one period are laid out once; every place of the endless stream follows from them by arithmetic, so that
there is no state to save: a place depends on the weights and on its number alone.
"""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

MAX_PERIOD = 100_000
"""Rows of the longest period: five digits a weight."""


class Stage(NamedTuple):
    """The weights from one step on."""

    from_step: int
    """The first global batch that they hold for, counted from 0."""
    weights: tuple[float, ...]
    """Of each source, relative to each other."""


class Mixture(NamedTuple):
    """How sources are mixed over a run."""

    sources: tuple[str, ...]
    epochs: tuple[int | None, ...]
    """How often the rows of each source may be seen at most; None is without end."""
    stages: tuple[Stage, ...]
    """The first one from step 0, the others ascending."""


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the relation of the weights, each taken as the decimal number that it prints as.

    Raises ValueError where one is negative, all are 0, or the numbers add up to more than ``MAX_PERIOD``.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    if min(exact) < 0 or not any(exact):
        raise ValueError(f"weights are {list(weights)}; none may be negative, and at least one has to be above 0")
    scale = math.lcm(*(weight.denominator for weight in exact))
    scaled = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*scaled)
    shares = tuple(share // divisor for share in scaled)
    if sum(shares) > MAX_PERIOD:
        raise ValueError(
            f"weights {list(weights)} are {':'.join(map(str, shares))} in whole numbers, which add up to "
            f"{sum(shares)}, and at most {MAX_PERIOD} is allowed: round them to fewer digits"
        )
    return shares


def interleave(shares: Sequence[int]) -> np.ndarray:
    """The source of each row of one period, int64 [sum(shares)]: share s times source s, spread evenly.

    Among the first p rows, source s stands floor(p w) or ceil(p w) times, w being its part of the period. Its row j may
    therefore stand at the places floor(j / w) to ceil((j + 1) / w) - 1, and among the rows that may stand at a place,
    the one whose last place is first is taken: this meets them all (earliest deadline first is optimal for jobs of unit
    length on one machine; the windows are those of Baruah et al. 1996, "Proportionate progress").
    """
    period = sum(shares)
    order = np.empty(period, np.int64)
    taken = [0] * len(shares)
    waiting = [(0, source) for source, share in enumerate(shares) if share]
    ready: list[tuple[int, int]] = []
    for place in range(period):
        while waiting and waiting[0][0] <= place:
            _, source = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(taken[source] + 1) * period // shares[source]) - 1, source))
        _, source = heapq.heappop(ready)
        order[place] = source
        taken[source] += 1
        if taken[source] < shares[source]:
            heapq.heappush(waiting, (taken[source] * period // shares[source], source))
    return order


class _Pattern:
    """A period that is repeated without end."""

    def __init__(self, weights: Sequence[float]):
        shares = whole_shares(weights)
        self._shares = np.array(shares, np.int64)
        self._order = interleave(shares)
        # How many rows of the same source stand before a row in its period.
        self._rank = np.empty(len(self._order), np.int64)
        for source, share in enumerate(shares):
            self._rank[self._order == source] = np.arange(share)

    def find(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source at each place, and how many of its rows stand before: both int64 like ``places``."""
        period, within = np.divmod(places, len(self._order))
        source = self._order[within]
        return source, period * self._shares[source] + self._rank[within]

    def count(self, num_rows: int) -> np.ndarray:
        """Rows of each source among the first ``num_rows``, int64 [num_sources]."""
        periods, rest = divmod(num_rows, len(self._order))
        return periods * self._shares + np.bincount(self._order[:rest], minlength=len(self._shares))


class Schedule:
    """The places of a mixture's rows in global batches of one size.

    Within each stage, counted from its start, every source has at every place the rows that its weight asks for, to
    within one row. What a stage holds does not depend on the stages after it.
    """

    def __init__(self, stages: Sequence[Stage], global_batch_size: int):
        assert stages[0].from_step == 0
        self._batch = global_batch_size
        self._first_steps = [stage.from_step for stage in stages]
        assert self._first_steps == sorted(set(self._first_steps))
        self._patterns = [_Pattern(stage.weights) for stage in stages]
        # Rows of each source before each stage.
        self._before = [np.zeros(len(stages[0].weights), np.int64)]
        for number, stage in enumerate(stages[1:]):
            rows = (stage.from_step - stages[number].from_step) * global_batch_size
            self._before.append(self._before[-1] + self._patterns[number].count(rows))

    def find(self, step: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each of the rows ``start`` to ``stop`` of global batch ``step``, and its place in that source's
        own endless stream: both int64 [stop - start]."""
        stage = self._stage(step)
        first = (step - self._first_steps[stage]) * self._batch
        source, place = self._patterns[stage].find(np.arange(first + start, first + stop))
        return source, self._before[stage][source] + place

    def count(self, num_steps: int) -> np.ndarray:
        """Rows of each source in the first ``num_steps`` global batches, int64 [num_sources]."""
        stage = self._stage(max(num_steps - 1, 0))
        rows = (num_steps - self._first_steps[stage]) * self._batch
        return self._before[stage] + self._patterns[stage].count(rows)

    def _stage(self, step: int) -> int:
        return int(np.searchsorted(self._first_steps, step, side="right")) - 1
