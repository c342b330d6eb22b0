"""Attention in plain jnp: all scores of a row, or of a block of queries, at once. What other kernels are compared with.

Legend: B batch, T query positions, S key positions, N query heads, K kv heads, G query heads per kv head,
R rows of a product (the queries of all heads of a group), H head_dim, V that of values.
"""

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from lmjax.ops.attention_mask import Mask, visible_pairs
from lmjax.ops.attention_scores import adjusted, softmax


def reference_attention(
    q_BTNH: Float[Array, "batch T heads head_dim"],
    k_BSKH: Float[Array, "batch S kv_heads head_dim"],
    v_BSKH: Float[Array, "batch S kv_heads value_dim"],
    segment_ids_BT: Int[Array, "batch T"] | None,
    prefix_BT: Bool[Array, "batch T"] | None = None,
    slopes_N: Float[Array, " heads"] | None = None,
    sinks_N: Float[Array, " heads"] | None = None,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    save_as: str | None = None,
    block: int | None = None,
) -> Float[Array, "batch T heads value_dim"]:
    """softmax(scores) v in the dtype of q, the softmax in float32. A query that sees nothing gives 0.

    ``prefix`` marks keys that their whole segment sees, ``slopes`` are ALiBi's, ``sinks`` the scores of sinks (see
    ``lmjax.ops.attention_scores``). ``save_as`` names, for ``jax.checkpoint`` policies, what the backward pass needs of
    the result. With ``block``, that many queries are taken at a time, and only the keys that ``mask`` may leave them.
    """
    B, T, N, H = q_BTNH.shape
    S, K, V = *k_BSKH.shape[1:3], v_BSKH.shape[3]
    slopes_KG, sinks_KG = (None if x is None else x.reshape(K, N // K) for x in (slopes_N, sinks_N))
    # Heads first, once: what follows are products over leading dimensions, and slices of whole rows.
    q_BKGTH = jnp.einsum("btkgh->bkgth", q_BTNH.reshape(B, T, K, N // K, H))
    whole_k_BKSH, whole_v_BKSH = (jnp.swapaxes(x, 1, 2) for x in (k_BSKH, v_BSKH))
    parts = []
    for start in range(0, T, block or T):
        stop = min(start + (block or T), T)
        first, last = 0, S
        if block is not None and mask.causal and prefix_BT is None:
            first, last = 0 if mask.window is None else max(0, start - mask.window + 1), stop
        distance_TS = jnp.arange(start, stop)[:, None] - jnp.arange(first, last)
        q_BKRH = q_BKGTH[:, :, :, start:stop].reshape(B, K, -1, H)
        k_BKSH, v_BKSH = whole_k_BKSH[:, :, first:last], whole_v_BKSH[:, :, first:last]
        products_BKRS = scale * jnp.einsum("bkrh,bksh->bkrs", q_BKRH, k_BKSH, preferred_element_type=jnp.float32)
        products_BKGTS = products_BKRS.reshape(B, K, N // K, stop - start, last - first)
        scores_BKGTS = adjusted(products_BKGTS, distance_TS, softcap=softcap, slopes_KG=slopes_KG)
        visible = visible_pairs(
            mask,
            distance_TS,
            None if segment_ids_BT is None else segment_ids_BT[:, start:stop],
            None if segment_ids_BT is None else segment_ids_BT[:, first:last],
            None if prefix_BT is None else prefix_BT[:, first:last],
        )
        weights_BKGTS = softmax(scores_BKGTS, visible, sinks_KG).astype(v_BSKH.dtype)
        weights_BKRS = weights_BKGTS.reshape(products_BKRS.shape)
        parts.append(jnp.einsum("bkrs,bksh->bkrh", weights_BKRS, v_BKSH).reshape(B, K, N // K, stop - start, V))
    out_BKGTH = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)
    out_BTKGH = jnp.einsum("bkgth->btkgh", out_BKGTH)
    out_BTNH = out_BTKGH.reshape(B, T, N, V).astype(q_BTNH.dtype)
    if segment_ids_BT is not None:
        out_BTNH = jnp.where((segment_ids_BT != 0)[:, :, None, None], out_BTNH, 0)
    return out_BTNH if save_as is None else checkpoint_name(out_BTNH, save_as)
