"""The keys and values of earlier tokens, and where new ones are written.

A forward pass writes the same columns of every row. Rows are aligned at the ends of their prompts: column c of row b
has the position c - first[b], and what is before first[b] is padding. Column c lies in slot c mod S of a layer's S
slots, so that a layer with a window needs few: the columns that its queries have left behind are written over.

Legend: L layers, B batch, T new positions, S slots of the cache, K kv heads, H head_dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class LayerCache(NamedTuple):
    """Keys (rotated) and values, one slot a token: stacked over layers as their parameters are, or of one layer.

    Heads come before slots, so that a head's keys are a matrix that products read as it lies. Latent attention has one
    head: its keys are a latent vector and a rotated key, its values the latent vectors.
    """

    keys: Float[Array, "*layers batch kv_heads slots head_dim"]
    values: Float[Array, "*layers batch kv_heads slots value_dim"]


class CacheWrite(NamedTuple):
    """Where a forward pass puts its T tokens."""

    start: Int[Array, ""]
    """The column of the first; a multiple of T for a cache that has fewer slots than there are columns."""
    first_B: Int[Array, " batch"]
    """The column of each row's position 0."""
    length_B: Int[Array, " batch"]
    """Tokens of each row up to now, the whole prompt from its first part on: what scaled rotations go by."""
    layer: Int[Array, ""] | int = 0
    """Which of the stacked layers is at work."""


def slots_of_window(window: int, part: int) -> int:
    """The fewest slots that hold what ``part`` queries see through ``window``, with no wrap inside of a part."""
    return -(-(window - 1 + part) // part) * part


def appended(
    cache: LayerCache,
    k_BTKH: Float[Array, "batch T kv_heads head_dim"],
    v_BTKH: Float[Array, "batch T kv_heads value_dim"],
    write: CacheWrite,
) -> tuple[LayerCache, LayerCache, Int[Array, "batch slots"]]:
    """The stacked cache with the new keys and values in it, the part of this layer, and the position in each slot.

    A slot that holds nothing, or padding, has the position -1.
    """
    slots = cache.keys.shape[-2]
    at = (write.layer, 0, 0, write.start % slots, 0)
    cache = LayerCache(
        jax.lax.dynamic_update_slice(cache.keys, jnp.swapaxes(k_BTKH, 1, 2)[None], at),
        jax.lax.dynamic_update_slice(cache.values, jnp.swapaxes(v_BTKH, 1, 2)[None], at),
    )
    here = LayerCache(*(jax.lax.dynamic_index_in_dim(stacked, write.layer, 0, keepdims=False) for stacked in cache))
    return cache, here, _key_positions(write, slots, k_BTKH.shape[1])


def _key_positions(write: CacheWrite, slots: int, new: int) -> Int[Array, "batch slots"]:
    last = write.start + new - 1
    columns_S = last - (last - jnp.arange(slots)) % slots
    return jnp.maximum(columns_S - write.first_B[:, None], -1)
