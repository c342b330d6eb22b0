"""Attention of a few new queries over the keys and values of a cache.

Legend: B batch, T new positions, S slots of the cache, K kv heads, G query heads per kv head, H head_dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cached_attention(
    q_BTNH: Float[Array, "batch seq heads head_dim"],
    k_BSKH: Float[Array, "batch slots kv_heads head_dim"],
    v_BSKH: Float[Array, "batch slots kv_heads head_dim"],
    query_positions_BT: Int[Array, "batch seq"],
    key_positions_BS: Int[Array, "batch slots"],
    *,
    window: int | None,
    scale: float,
) -> Float[Array, "batch seq heads head_dim"]:
    """softmax(q k^T * scale) v over the slots that hold an earlier or the same position, in float32.

    A slot whose position is -1 is empty. A query whose own position is -1 (padding) sees nothing and gives 0.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    heads = jax.typeof(k_BSKH).sharding.spec[2]
    batch = jax.typeof(q_BTNH).sharding.spec[0]
    if heads is None:  # K/V heads that tensor does not divide are whole on every device, and so the queries have to be
        q_BTNH = jax.sharding.reshard(q_BTNH, jax.P(batch, None, None, None))
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H, out_sharding=jax.P(batch, None, heads, None, None))
    scores_BKGTS = scale * jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    distance_BTS = query_positions_BT[:, :, None] - key_positions_BS[:, None, :]
    visible_BTS = (key_positions_BS[:, None, :] >= 0) & (distance_BTS >= 0)
    if window is not None:
        visible_BTS &= distance_BTS < window
    visible = visible_BTS[:, None, None]
    scores_BKGTS = jnp.where(visible, scores_BKGTS, -1e30)
    weights = jnp.where(visible, jax.nn.softmax(scores_BKGTS, axis=-1), 0.0).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("bkgts,bskh->btkgh", weights, v_BSKH)
    return out_BTKGH.reshape(B, T, N, H, out_sharding=jax.P(batch, None, heads, None))
