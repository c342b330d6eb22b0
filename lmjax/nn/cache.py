"""The keys and values of earlier tokens, and where new ones are written.

Legend: B batch, T new positions, S slots of the cache, K kv heads, H head_dim.
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int


class LayerCache(NamedTuple):
    """Keys (rotated) and values of the tokens so far, one slot each."""

    keys_BSKH: Float[Array, "batch slots kv_heads head_dim"]
    values_BSKH: Float[Array, "batch slots kv_heads head_dim"]


class CacheWrite(NamedTuple):
    """Where a forward pass puts its tokens: the slots from ``start`` on, the same for every row."""

    start: Int[Array, ""]
    key_positions_BS: Int[Array, "batch slots"]
    """The position that each slot holds once these tokens are written; -1 where it holds none."""


def written(
    cache: LayerCache,
    k_BTKH: Float[Array, "batch T kv_heads head_dim"],
    v_BTKH: Float[Array, "batch T kv_heads head_dim"],
    write: CacheWrite,
) -> tuple[LayerCache, Int[Array, "batch slots"]]:
    """The cache with the new keys and values in it, and the position that each of its slots then holds."""
    cache = LayerCache(
        jax.lax.dynamic_update_slice_in_dim(cache.keys_BSKH, k_BTKH, write.start, 1),
        jax.lax.dynamic_update_slice_in_dim(cache.values_BSKH, v_BTKH, write.start, 1),
    )
    return cache, write.key_positions_BS
