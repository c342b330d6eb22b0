"""Attention in plain jnp: every score at once. What the other kernels are compared with.

Legend: B batch, T query positions, S key positions, N query heads, K kv heads, G query heads per kv head, H head_dim.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lmjax.ops.attention_mask import Mask, same_segment

HIDDEN = -1e30
"""The score of a key that a query does not see: finite, since -inf - -inf is not a number."""


def reference_attention(
    q_BTNH: Float[Array, "batch T heads head_dim"],
    k_BSKH: Float[Array, "batch S kv_heads head_dim"],
    v_BSKH: Float[Array, "batch S kv_heads head_dim"],
    segment_ids_BT: Int[Array, "batch T"] | None,
    *,
    mask: Mask,
    scale: float,
    save_as: str | None = None,
) -> Float[Array, "batch T heads head_dim"]:
    """softmax(scale q k^T) v in the dtype of q, the softmax in float32. A query that sees nothing gives 0.

    ``save_as`` names, for ``jax.checkpoint`` policies, what the backward pass needs of the result.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = scale * jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    visible = mask.visible(jnp.arange(T), jnp.arange(S))
    if segment_ids_BT is not None:
        visible = (visible & same_segment(segment_ids_BT, segment_ids_BT))[:, None, None]
    weights_BKGTS = jax.nn.softmax(jnp.where(visible, scores_BKGTS, HIDDEN), axis=-1).astype(v_BSKH.dtype)
    out_BTNH = jnp.einsum("bkgts,bskh->btkgh", weights_BKGTS, v_BSKH).reshape(B, T, N, H).astype(q_BTNH.dtype)
    if segment_ids_BT is not None:
        out_BTNH = jnp.where((segment_ids_BT != 0)[:, :, None, None], out_BTNH, 0)
    return out_BTNH if save_as is None else checkpoint_name(out_BTNH, save_as)
