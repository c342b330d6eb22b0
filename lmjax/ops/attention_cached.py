"""Attention of new queries over the keys and values of a cache.

Legend: B batch, T new positions, S slots of the cache, N query heads, K kv heads, G query heads per kv
head, M the T x G queries of a kv head, H head_dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmjax.ops.attention_scores import adjusted, expanded, softmax


def cached_attention(
    q_BTNH: Float[Array, "batch seq heads head_dim"],
    k_BKSH: Float[Array, "batch kv_heads slots head_dim"],
    v_BKSH: Float[Array, "batch kv_heads slots value_dim"],
    query_positions_BT: Int[Array, "batch seq"],
    key_positions_BS: Int[Array, "batch slots"],
    slopes_N: Float[Array, " heads"] | None = None,
    sinks_N: Float[Array, " heads"] | None = None,
    *,
    window: int | None,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "batch seq heads value_dim"]:
    """Attention over the slots that hold the same or an earlier position, in the dtype of q, the softmax in float32.

    With ``window``, query i sees key j where i - window < j <= i. A slot whose position is -1 is empty. A query whose
    own position is -1 (padding) sees nothing and gives 0. The result is sharded by heads where k and v are. Scores are
    (batch, heads, T, S) at once: a long prompt is given in parts. Other arguments are those of ``reference_attention``.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    batch, heads, _, _ = jax.typeof(k_BKSH).sharding.spec
    if heads is None:  # K/V heads that tensor does not divide are whole on every device, and so the queries have to be
        q_BTNH = jax.sharding.reshard(q_BTNH, jax.P(batch, None, None, None))
    slopes_KG, sinks_KG = (
        None if x is None else jax.sharding.reshard(x, jax.P(heads)).reshape(K, N // K, out_sharding=jax.P(heads, None))
        for x in (slopes_N, sinks_N)
    )
    distance_BTS = query_positions_BT[:, :, None] - key_positions_BS[:, None, :]
    visible_BTS = (key_positions_BS[:, None, :] >= 0) & (distance_BTS >= 0)
    if window is not None:
        visible_BTS &= distance_BTS < window

    def of_heads(x: jax.Array, *dims: int) -> jax.Array:
        return x.reshape(B, *dims, out_sharding=jax.P(batch, heads, *(None,) * (len(dims) - 1)))

    q_BKMH = of_heads(jnp.swapaxes(q_BTNH, 1, 2), K, N // K * T, H)
    products_BKMS = scale * jax.lax.dot_general(
        q_BKMH, k_BKSH, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
    )
    products_BKGTS = of_heads(products_BKMS, K, N // K, T, -1)
    scores_BKGTS = adjusted(products_BKGTS, distance_BTS, softcap=softcap, slopes_KG=slopes_KG)
    weights_BKGTS = softmax(scores_BKGTS, visible_BTS, sinks_KG)
    weights_BKGTS = jnp.where(expanded(visible_BTS), weights_BKGTS, 0.0).astype(v_BKSH.dtype)
    weights_BKMS = of_heads(weights_BKGTS, K, N // K * T, -1)
    out_BKMH = jax.lax.dot_general(weights_BKMS, v_BKSH, (((3,), (2,)), ((0, 1), (0, 1))))
    return jnp.swapaxes(of_heads(out_BKMH, N, T, v_BKSH.shape[3]), 1, 2)
