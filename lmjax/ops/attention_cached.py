"""Attention of new queries over the keys and values of a cache.

Legend: B batch, T new positions, S slots of the cache, N query heads, K kv heads, G query heads per kv
head, H head_dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmjax.ops.attention_reference import HIDDEN


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
    """softmax(scale q k^T) v over the slots that hold the same or an earlier position, in the dtype of q.

    The softmax is in float32. With ``window``, query i sees key j where i - window < j <= i. A slot whose position is
    -1 is empty. A query whose own position is -1 (padding) sees nothing and gives 0. The result is sharded by heads
    where k and v are. Scores are (batch, heads, T, S) at once: a long prompt is given in parts.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    batch, _, heads, _ = jax.typeof(k_BSKH).sharding.spec
    if heads is None:  # K/V heads that tensor does not divide are whole on every device, and so the queries have to be
        q_BTNH = jax.sharding.reshard(q_BTNH, jax.P(batch, None, None, None))
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H, out_sharding=jax.P(batch, None, heads, None, None))
    scores_BKGTS = scale * jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    distance_BTS = query_positions_BT[:, :, None] - key_positions_BS[:, None, :]
    visible_BTS = (key_positions_BS[:, None, :] >= 0) & (distance_BTS >= 0)
    if window is not None:
        visible_BTS &= distance_BTS < window
    visible = visible_BTS[:, None, None]
    weights_BKGTS = jax.nn.softmax(jnp.where(visible, scores_BKGTS, HIDDEN), axis=-1)
    weights_BKGTS = jnp.where(visible, weights_BKGTS, 0.0).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH)
    return out_BTKGH.reshape(B, T, N, H, out_sharding=jax.P(batch, None, heads, None))
