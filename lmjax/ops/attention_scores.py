"""From the products of queries and keys to attention weights: what all kernels in plain jnp share.

Legend: B batch, T queries, S keys, K kv heads, G query heads per kv head.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

HIDDEN = -1e30
"""The score of a key that a query does not see: finite, since -inf - -inf is not a number."""


def adjusted(
    products_BKGTS: Float[Array, "batch kv_heads group T S"],
    distance: Array,
    *,
    softcap: float | None,
    slopes_KG: Float[Array, "kv_heads group"] | None,
) -> Float[Array, "batch kv_heads group T S"]:
    """From scale q k^T in float32 to scores: softcap x tanh(products / softcap) - slope x |distance|.

    ``distance``, from key to query in positions, is (T, S) or (batch, T, S). Soft-capping is that of Gemma 2
    (arXiv 2408.00118, section 2), the slopes are ALiBi's (arXiv 2108.12409, section 3).
    """
    if softcap is not None:
        products_BKGTS = softcap * jnp.tanh(products_BKGTS / softcap)
    if slopes_KG is not None:
        products_BKGTS -= slopes_KG[:, :, None, None] * jnp.abs(expanded(distance)).astype(jnp.float32)
    return products_BKGTS


def softmax(
    scores_BKGTS: Float[Array, "batch kv_heads group T S"],
    visible: Array,
    sinks_KG: Float[Array, "kv_heads group"] | None,
) -> Float[Array, "batch kv_heads group T S"]:
    """The weights of the visible keys ((T, S) or (batch, T, S)). A sink takes part in the sum and has no value, so that
    a head may look at nothing (gpt-oss; transformers' GptOssAttention)."""
    scores_BKGTS = jnp.where(expanded(visible), scores_BKGTS, HIDDEN)
    if sinks_KG is None:
        return jax.nn.softmax(scores_BKGTS, axis=-1)
    sinks_KG11 = sinks_KG[:, :, None, None].astype(jnp.float32)
    max_BKGT1 = jax.lax.stop_gradient(jnp.maximum(scores_BKGTS.max(-1, keepdims=True), sinks_KG11))
    exp_BKGTS = jnp.exp(scores_BKGTS - max_BKGT1)
    return exp_BKGTS / (exp_BKGTS.sum(-1, keepdims=True) + jnp.exp(sinks_KG11 - max_BKGT1))


def expanded(per_pair: Array) -> Array:
    """(T, S) or (batch, T, S) as it goes with (batch, kv_heads, group, T, S)."""
    return per_pair if per_pair.ndim == 2 else per_pair[:, None, None]
