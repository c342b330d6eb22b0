"""Mixtures: at every place each source has the rows that its weight asks for, to within one row."""

import itertools

import numpy as np
import pytest

from lmjax.data import mixture
from lmjax.data.mixture import Schedule, Stage, interleave, whole_shares

pytestmark = pytest.mark.fast


def counts(order, num_sources):
    """Rows of each source among the first 1, 2, … rows: [len(order), num_sources]."""
    return np.cumsum(np.asarray(order)[:, None] == np.arange(num_sources), axis=0)


def is_level(order, shares):
    """Whether every prefix has floor or ceil of what each share asks for, in whole numbers."""
    wished = np.outer(np.arange(1, len(order) + 1), shares)
    found = counts(order, len(shares)) * sum(shares)
    return bool((abs(found - wished) < sum(shares)).all())


def test_weights_count_as_the_decimal_numbers_that_they_print_as():
    assert whole_shares([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert whole_shares([3.0, 0.0, 1.5]) == (2, 0, 1)
    assert whole_shares([1e-4, 1.0]) == (1, 10_000)
    assert whole_shares([5.0]) == (1,)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.0, 0.0], "at least one has to be above 0"),
        ([1.0, -0.5], "none may be negative"),
        ([0.3333333, 0.6666667], "round them to fewer digits"),
        ([123457.0, 1.0], r"are 123457:1 in whole numbers, which add up to 123458, and at most 100000"),
    ],
)
def test_weights_that_cannot_be_met_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        whole_shares(weights)


def test_the_order_of_a_few_weights_is_the_one_of_the_first_release():
    """Frozen values: another order would change the batches of every mixed run."""
    assert interleave([7, 3]).tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0, 1]
    assert interleave([5, 3, 2]).tolist() == [0, 1, 0, 2, 0, 1, 0, 1, 0, 2]
    assert interleave([1, 1, 1]).tolist() == [0, 1, 2]


@pytest.mark.parametrize("num_sources", [1, 2, 3, 5, 12])
def test_every_prefix_has_what_the_weights_ask_for_to_within_one_row(rng, num_sources):
    for _ in range(40):
        drawn = rng.integers(0, 30, num_sources) ** 2
        shares = whole_shares([*map(float, drawn), 1.0])
        order = interleave(shares)
        assert np.bincount(order, minlength=len(shares)).tolist() == list(shares)
        assert is_level(order, shares), shares


def test_control_an_order_by_turns_or_by_chance_is_not_level(rng):
    shares = (5, 3, 2)
    assert is_level(interleave(shares), shares)
    assert not is_level(np.repeat(np.arange(3), shares), shares), "one source after the other"
    by_chance = [rng.permutation(np.repeat(np.arange(3), np.multiply(shares, 10))) for _ in range(5)]
    assert not any(is_level(order, [50, 30, 20]) for order in by_chance)


def rows_of(schedule, num_steps, batch):
    """(source, place) of every row of the first steps."""
    found = [schedule.find(step, 0, batch) for step in range(num_steps)]
    return np.concatenate([part[0] for part in found]), np.concatenate([part[1] for part in found])


STAGES = (Stage(0, (0.5, 0.3, 0.2)), Stage(4, (0.0, 1.0, 3.0)), Stage(9, (1.0, 1.0, 1.0)))


@pytest.mark.parametrize("batch", [1, 7, 10])
def test_every_source_gives_its_rows_in_turn_through_all_stages(batch):
    sources, places = rows_of(Schedule(STAGES, batch), 15, batch)
    for source in range(3):
        assert places[sources == source].tolist() == list(range((sources == source).sum()))
    for stage, (first, stop) in zip(STAGES, itertools.pairwise([0, 4, 9, 15]), strict=True):
        assert is_level(sources[first * batch : stop * batch], whole_shares(stage.weights))
    whole = sources[: 9 * batch]
    assert batch < 7 or not is_level(whole, whole_shares(STAGES[0].weights)), "control: the weights do change"


@pytest.mark.parametrize("batch", [1, 7, 10])
def test_counts_are_those_of_the_rows(batch):
    schedule = Schedule(STAGES, batch)
    sources, _ = rows_of(schedule, 15, batch)
    for steps in range(16):
        assert schedule.count(steps).tolist() == np.bincount(sources[: steps * batch], minlength=3).tolist()


def test_a_place_does_not_depend_on_what_was_asked_before_nor_on_later_stages():
    batch = 8
    sources, places = rows_of(Schedule(STAGES, batch), 15, batch)
    fresh = [Schedule(STAGES, batch).find(step, 3, 5) for step in reversed(range(15))][::-1]
    for step, (some, where) in enumerate(fresh):
        assert some.tolist() == sources[step * batch + 3 : step * batch + 5].tolist()
        assert where.tolist() == places[step * batch + 3 : step * batch + 5].tolist()
    shorter = rows_of(Schedule(STAGES[:2], batch), 15, batch)[0]
    assert np.array_equal(shorter[: 9 * batch], sources[: 9 * batch])
    assert not np.array_equal(shorter, sources), "control: a later stage has later rows"


def test_the_longest_period_is_level_and_far_places_are_found_at_once(monkeypatch):
    weights = (0.50001, 0.3, 0.1, 0.09999)
    schedule = Schedule((Stage(0, weights),), 1024)
    assert sum(whole_shares(weights)) == mixture.MAX_PERIOD
    step = 10**9
    exact = np.multiply(whole_shares(weights), step * 1024)
    assert (abs(schedule.count(step) * mixture.MAX_PERIOD - exact) < mixture.MAX_PERIOD).all()
    sources, places = schedule.find(step, 0, 1024)
    first = schedule.count(step)
    for source in range(4):
        here = places[sources == source]
        assert here.tolist() == list(range(first[source], first[source] + len(here)))
