"""Which keys a query sees and which tiles that leaves, against every pair written out."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.ops.attention_mask import Mask, visible_pairs
from lmjax.ops.attention_tiles import (
    FIRST,
    LAST,
    MASKED,
    TileRanges,
    most_steps,
    schedule,
    tile_length,
    tile_ranges,
    visible_keys,
)
from tests.ops.attention_case import make_case

pytestmark = pytest.mark.fast

MASKS = [Mask(), Mask(window=1), Mask(window=9), Mask(window=40), Mask(causal=False)]


def seen(mask: Mask, length: int, segment_ids=None, prefix=None) -> np.ndarray:
    """(rows, queries, keys), by the function that the kernels in plain jnp mask with."""
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    found = np.asarray(visible_pairs(mask, distance, segment_ids, segment_ids, prefix))
    return found if found.ndim == 3 else found[None]


def drawn(rng, mask: Mask, *, segmented: bool, with_prefix: bool, length: int):
    case = make_case(rng, batch=3, length=length)
    segment_ids = jnp.asarray(case.segment_ids) if segmented else None
    if not with_prefix or not mask.causal or mask.window is not None:
        return segment_ids, None
    prefix = case.prefix if segmented else np.arange(length) < np.array([[0], [7], [length]])
    return segment_ids, jnp.asarray(prefix)


@pytest.fixture(params=list(itertools.product(MASKS, (False, True), (False, True), (61,))), ids=str)
def rows(request, rng):
    """A mask, the segments and prefixes of rows, and the pairs that are visible."""
    mask, segmented, with_prefix, length = request.param
    segment_ids, prefix = drawn(rng, mask, segmented=segmented, with_prefix=with_prefix, length=length)
    return mask, length, segment_ids, prefix, seen(mask, length, segment_ids, prefix)


def test_a_first_key_and_an_end_say_what_is_visible(rows):
    mask, length, segment_ids, prefix, pairs = rows
    visible = visible_keys(mask, length, segment_ids, prefix)
    key = np.arange(length)
    found = (np.asarray(visible.first_BT)[..., None] <= key) & (key < np.asarray(visible.end_BT)[..., None])
    np.testing.assert_array_equal(found, pairs)
    assert np.asarray(visible.is_exact_B).all()
    assert isinstance(visible.first_BT, np.ndarray) == (segment_ids is None and prefix is None)


def tiles_of(pairs: np.ndarray, query_tile: int, key_tile: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows, tiles of queries, tiles of keys): whether any pair is visible, and whether all are."""
    batch, length = pairs.shape[:2]
    num_queries, num_keys = -(-length // query_tile), -(-length // key_tile)
    any_, all_ = np.zeros((2, batch, num_queries, num_keys), bool)
    for i, j in np.ndindex(num_queries, num_keys):
        part = pairs[:, i * query_tile : (i + 1) * query_tile, j * key_tile : (j + 1) * key_tile]
        any_[:, i, j] = part.any((1, 2))
        all_[:, i, j] = part.all((1, 2)) & ((j + 1) * key_tile <= length)
    return any_, all_


def as_pairs(ranges: TileRanges, num_others: int) -> tuple[np.ndarray, np.ndarray]:
    """What ``tiles_of`` gives: tiles to visit, and those without a mask."""
    first, end, unmasked_first, unmasked_end = (np.asarray(x)[..., None] for x in ranges)
    other = np.arange(num_others)
    return (first <= other) & (other < end), (unmasked_first <= other) & (other < unmasked_end)


@pytest.mark.parametrize(("query_tile", "key_tile"), [(8, 8), (16, 4), (4, 16)])
def test_just_the_tiles_of_which_something_is_visible_are_visited(rows, query_tile, key_tile):
    mask, length, segment_ids, prefix, pairs = rows
    by_query, by_key = tile_ranges(visible_keys(mask, length, segment_ids, prefix), query_tile, key_tile)
    any_, all_ = tiles_of(pairs, query_tile, key_tile)
    num_queries, num_keys = any_.shape[1:]
    to_visit, unmasked = as_pairs(by_query, num_keys)
    np.testing.assert_array_equal(to_visit, any_)
    np.testing.assert_array_equal(unmasked & to_visit, all_)
    for of_queries, of_keys in zip((to_visit, unmasked), as_pairs(by_key, num_queries), strict=True):
        np.testing.assert_array_equal(of_keys.swapaxes(1, 2), of_queries)


@pytest.mark.parametrize(("query_tile", "key_tile"), [(8, 8), (16, 4)])
def test_a_schedule_makes_each_visit_once_tile_by_tile(rows, query_tile, key_tile):
    mask, length, segment_ids, prefix, _ = rows
    sizes = -(-length // query_tile), -(-length // key_tile)
    every = tile_ranges(visible_keys(mask, length, segment_ids, prefix), query_tile, key_tile)
    most = most_steps(mask, length, query_tile, key_tile, has_prefix=prefix is not None)
    for ranges, num_others, limit in zip(every, reversed(sizes), most, strict=True):
        to_visit, unmasked = as_pairs(ranges, num_others)
        batch, num_tiles = to_visit.shape[:2]
        plan = schedule(ranges, num_others, batch * limit)
        steps = int(plan.num_steps)
        assert steps <= batch * limit == len(plan.tile_W)
        visits = list(zip(*(np.asarray(x)[:steps].tolist() for x in plan[1:]), strict=True))
        counts = np.zeros(to_visit.shape, int)
        for row, tile, other, flags in visits:
            counts[row, tile, other] += 1
            assert bool(flags & MASKED) != unmasked[row, tile, other]
        nothing_seen = ~to_visit.any(-1)  # visited all the same, once, and masked
        assert (counts.sum(-1)[nothing_seen] == 1).all()
        np.testing.assert_array_equal(counts[~nothing_seen], to_visit[~nothing_seen])
        order = [(row, tile) for row, tile, *_ in visits]
        assert order == sorted(order)
        for flag, neighbours in ((FIRST, [None, *order[:-1]]), (LAST, [*order[1:], None])):
            at_an_end = [one != other for one, other in zip(order, neighbours, strict=True)]
            assert [bool(flags & flag) for *_, flags in visits] == at_an_end
        assert {(row, tile) for row, tile in order} == set(np.ndindex(batch, num_tiles))


def test_packed_rows_cost_what_their_documents_cost():
    length, tile, document = 4096, 128, 512
    segment_ids = jnp.asarray(np.arange(length)[None] // document + 1)
    counts = []
    for ids, of in ((segment_ids, length // document), (None, 1)):
        by_query, _ = tile_ranges(visible_keys(Mask(), length, ids), tile, tile)
        num_tiles = length // of // tile
        counts.append(int((by_query.end_BI - by_query.first_BI).sum()))
        assert counts[-1] == of * num_tiles * (num_tiles + 1) // 2
    assert counts[0] * 6 < counts[1]


@pytest.mark.parametrize(
    ("segment_ids", "is_exact"),
    [
        ([1, 1, 2, 2, 0, 0], True),
        ([0, 1, 1, 0, 3, 3], True),
        ([5, 5, 5, 5, 5, 5], True),
        ([0, 0, 0, 0, 0, 0], True),
        ([1, 1, 2, 2, 1, 1], False),
        ([2, 2, 1, 1, 0, 0], False),
        ([1, 1, 0, 1, 1, 0], False),
    ],
)
def test_segments_that_come_back_are_noticed(segment_ids, is_exact):
    visible = visible_keys(Mask(), 6, jnp.asarray([[1] * 6, segment_ids]))
    assert visible.is_exact_B.tolist() == [True, is_exact]


@pytest.mark.parametrize(
    ("prefix", "is_exact"),
    [([1, 1, 0, 1, 0, 0], True), ([0, 0, 0, 1, 1, 1], True), ([0, 1, 0, 0, 0, 0], False), ([1, 0, 0, 0, 0, 1], False)],
)
def test_a_prefix_that_is_not_the_beginning_of_its_segment_is_noticed(prefix, is_exact):
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2]])
    visible = visible_keys(Mask(), 6, ids, jnp.asarray([prefix], bool))
    assert visible.is_exact_B.tolist() == [is_exact]


@pytest.mark.parametrize(
    ("length", "tile"), [(1, 128), (128, 128), (129, 256), (512, 512), (513, 384), (1000, 512), (8192, 512)]
)
def test_tiles_hold_little_but_the_row(length, tile):
    assert tile_length(length, 512, 128) == tile
