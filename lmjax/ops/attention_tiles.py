"""Block sparsity as data: which keys a query sees, which pairs of tiles that leaves, and the order to visit them in.

One description for every mask (causal, sliding window, segments, prefix): the keys that a query sees are those from a
first one up to an end. Kernels mask by these two numbers, and visit the tiles that they leave, no others.

Legend: B rows, T query positions, I tiles of queries or of keys, J tiles of the other, W steps of work.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from lmjax.ops.attention_mask import Mask

FIRST, LAST, MASKED, FLAG_BITS = 1, 2, 4, 3
"""What a step of a schedule is: the first of its tile, the last of it, one whose pairs are not all visible."""


class VisibleKeys(NamedTuple):
    """For each query the keys that it sees, ``first <= key < end``; none where the two are equal.

    Of NumPy where nothing depends on the row (B is 1 then), so that all that follows is known while compiling.
    """

    first_BT: Any
    end_BT: Any
    is_exact_B: Any
    """Whether that is what the segments and the prefix say: the id of a segment does not come back after another one's,
    and the prefix is the beginning of its segment."""


def visible_keys(
    mask: Mask,
    length: int,
    segment_ids_BT: Int[Array, "batch T"] | None = None,
    prefix_BT: Bool[Array, "batch T"] | None = None,
) -> VisibleKeys:
    """The keys that each of ``length`` queries sees among as many keys, as ``attention_mask.visible_pairs`` has it."""
    position_T = np.arange(length, dtype=np.int32)
    if segment_ids_BT is None and prefix_BT is None:
        first_T, end_T = np.zeros_like(position_T), np.full_like(position_T, length)
        if mask.causal:
            end_T = position_T + 1
        if mask.window is not None:
            first_T = np.maximum(0, end_T - mask.window)
        return VisibleKeys(first_T[None], end_T[None], np.ones(1, bool))
    if segment_ids_BT is None:
        assert prefix_BT is not None
        segment_ids_BT = jnp.ones(prefix_BT.shape, jnp.int32)
    before_BT = _shifted(segment_ids_BT, -1)
    is_start_BT = (segment_ids_BT != before_BT) | (position_T == 0)
    start_BT = jax.lax.cummax(jnp.where(is_start_BT, position_T, 0), axis=1)
    stop_BT = _next_BT(is_start_BT)
    largest_before_BT = jax.lax.cummax(before_BT, axis=1)
    comes_back_BT = is_start_BT & (segment_ids_BT != 0) & (segment_ids_BT <= largest_before_BT)
    is_exact_B = ~comes_back_BT.any(1)
    first_BT, end_BT = start_BT, stop_BT
    if mask.causal:
        end_BT = jnp.broadcast_to(position_T + 1, start_BT.shape)
    if mask.window is not None:
        first_BT = jnp.maximum(start_BT, end_BT - mask.window)
    if prefix_BT is not None:
        goes_on_BT = prefix_BT & ~is_start_BT
        is_exact_B &= ~(goes_on_BT & ~_shifted(prefix_BT, False)).any(1)
        end_BT = jnp.where(prefix_BT, _next_BT(~goes_on_BT), end_BT)
    is_padding_BT = segment_ids_BT == 0
    first_BT, end_BT = (jnp.where(is_padding_BT, position_T, x) for x in (first_BT, end_BT))
    return VisibleKeys(first_BT, end_BT, is_exact_B)


def _shifted(x_BT: jax.Array, filling: Any) -> jax.Array:
    """What stood one position before."""
    return jnp.pad(x_BT[:, :-1], ((0, 0), (1, 0)), constant_values=filling)


def _next_BT(is_marked_BT: jax.Array) -> jax.Array:
    """Of each position the next marked one after it, or the row's length."""
    length = is_marked_BT.shape[1]
    marked_BT = jnp.where(is_marked_BT, np.arange(length, dtype=np.int32), length)
    after_BT = jnp.pad(marked_BT[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    return jax.lax.cummin(after_BT, axis=1, reverse=True)


class TileRanges(NamedTuple):
    """For each tile of one side the tiles of the other: those to visit, and among them those that need no mask."""

    first_BI: Any
    end_BI: Any
    unmasked_first_BI: Any
    unmasked_end_BI: Any
    """All pairs of tiles in ``unmasked_first <= tile < unmasked_end`` are visible; none where end is not larger."""


def tile_ranges(visible: VisibleKeys, query_tile: int, key_tile: int) -> tuple[TileRanges, TileRanges]:
    """By tiles of queries, of ``query_tile`` positions, and by tiles of keys, of ``key_tile``. The last may be partial.

    Queries beyond the row's length see nothing and count for nothing.
    """
    xp: Any = np if isinstance(visible.first_BT, np.ndarray) else jnp
    first_BT, end_BT = visible[:2]
    batch, length = first_BT.shape
    num_queries, num_keys = -(-length // query_tile), -(-length // key_tile)

    def tiled(x_BT, filling):
        padded = xp.pad(x_BT, ((0, 0), (0, num_queries * query_tile - length)), constant_values=filling)
        return padded.reshape(batch, num_queries, query_tile)

    sees_BT = end_BT > first_BT
    sees_BI = tiled(sees_BT, False).any(-1)
    lowest_BI = tiled(xp.where(sees_BT, first_BT, length), length).min(-1) // key_tile
    highest_BI = -(-tiled(xp.where(sees_BT, end_BT, 0), 0).max(-1) // key_tile)
    unmasked_first_BI = -(-tiled(first_BT, 0).max(-1) // key_tile)
    unmasked_end_BI = tiled(end_BT, length).min(-1) // key_tile
    by_query = TileRanges(
        xp.where(sees_BI, lowest_BI, 0), xp.where(sees_BI, highest_BI, 0), unmasked_first_BI, unmasked_end_BI
    )

    # All of these grow from tile to tile, but for tiles that see nothing.
    tile_I1, key_J = np.arange(num_queries, dtype=np.int32)[:, None], np.arange(num_keys, dtype=np.int32)

    def first_beyond(end_BI, counts):
        return xp.where(counts & (end_BI[:, :, None] > key_J), tile_I1, num_queries).min(1)

    def end_up_to(first_BI, counts):
        return xp.where(counts & (first_BI[:, :, None] <= key_J), tile_I1 + 1, 0).max(1)

    sees_BI1 = sees_BI[:, :, None]
    by_key = TileRanges(
        first_beyond(highest_BI, sees_BI1),
        end_up_to(lowest_BI, sees_BI1),
        first_beyond(unmasked_end_BI, True),
        end_up_to(unmasked_first_BI, True),
    )
    return by_query, by_key


class Schedule(NamedTuple):
    """Pairs of tiles in the order of their visits, tile by tile; a tile without any is visited once, to write zeros."""

    num_steps: Any
    """How many of the steps below there are to make."""
    row_W: Any
    tile_W: Any
    other_W: Any
    flags_W: Any
    """Sums of FIRST, LAST and MASKED."""


def schedule(ranges: TileRanges, num_others: int, max_steps: int) -> Schedule:
    """The visits that ``ranges`` asks for, in arrays of ``max_steps``; ``num_others`` tiles are on the other side."""
    xp: Any = np if isinstance(ranges.first_BI, np.ndarray) else jnp
    batch, num_tiles = ranges.first_BI.shape
    first_X, end_X, unmasked_first_X, unmasked_end_X = (x.reshape(-1) for x in ranges)
    visits_X = xp.maximum(end_X - first_X, 1)
    stop_X = visits_X.cumsum(dtype=np.int32)
    step_W = np.arange(max_steps, dtype=np.int32)
    which_W = xp.minimum(xp.searchsorted(stop_X, step_W, side="right").astype(np.int32), batch * num_tiles - 1)
    from_first_W = step_W - (stop_X - visits_X)[which_W]
    other_W = xp.minimum(first_X[which_W] + from_first_W, num_others - 1)
    is_unmasked_W = (unmasked_first_X[which_W] <= other_W) & (other_W < unmasked_end_X[which_W])
    flags_W = (from_first_W == 0) * FIRST + (step_W + 1 == stop_X[which_W]) * LAST + ~is_unmasked_W * MASKED
    return Schedule(stop_X[-1], which_W // num_tiles, which_W % num_tiles, other_W, flags_W.astype(np.int32))


def most_steps(mask: Mask, length: int, query_tile: int, key_tile: int, *, has_prefix: bool) -> tuple[int, int]:
    """Steps of a row's schedule by queries and of that by keys, at most, whatever its segments and prefixes are."""
    widest = visible_keys(Mask(causal=False) if has_prefix else mask, length)
    by_query, by_key = (
        int(np.maximum(ranges.end_BI - ranges.first_BI, 1).sum())
        for ranges in tile_ranges(widest, query_tile, key_tile)
    )
    return by_query, by_key


def tile_length(length: int, most: int, multiple: int) -> int:
    """Positions of a tile, a multiple of ``multiple`` and at most ``most``, so that tiles hold little but the row."""
    num_tiles = -(-length // most)
    return math.ceil(length / num_tiles / multiple) * multiple
