"""Attention by blocks of queries and keys with a running softmax: memory linear in the length, backward pass included.

Legend: B batch, T positions, N query heads, K kv heads, G query heads per kv head, H head_dim;
I blocks, C positions of a block (of queries), S positions of a block (of keys).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from lmjax.ops.attention_mask import Mask, same_segment
from lmjax.ops.attention_reference import HIDDEN

BLOCK = 512
"""Positions of a block: the matrix products are large, and the scores of a pair of blocks still small."""


def chunked_attention(
    q_BTNH: Float[Array, "batch T heads head_dim"],
    k_BTKH: Float[Array, "batch T kv_heads head_dim"],
    v_BTKH: Float[Array, "batch T kv_heads head_dim"],
    segment_ids_BT: Int[Array, "batch T"] | None,
    *,
    mask: Mask,
    scale: float,
    save_as: str | None = None,
    block: int = BLOCK,
) -> Float[Array, "batch T heads head_dim"]:
    """What ``reference_attention`` gives, visiting only the pairs of blocks that ``mask`` does not hide entirely.

    FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2) with the pairs in one scan, so that the compiled program is
    as small for long rows as for short ones.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    num_blocks = -(-T // block)
    size = -(-T // num_blocks)
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones((B, T), jnp.int32)

    def blocks(x_BT):
        """(batch, positions, ...) to (blocks, batch, block's positions, ...); segment 0 fills the last block."""
        x_BT = jnp.pad(x_BT, ((0, 0), (0, num_blocks * size - T)) + ((0, 0),) * (x_BT.ndim - 2))
        return x_BT.reshape(B, num_blocks, size, *x_BT.shape[2:]).swapaxes(0, 1)

    out_IBCKGH: jax.Array = _blocked(
        mask,
        scale,
        save_as,
        blocks(q_BTNH.reshape(B, T, K, N // K, H)),
        blocks(k_BTKH),
        blocks(v_BTKH),
        blocks(segment_ids_BT),
    )
    return out_IBCKGH.swapaxes(0, 1).reshape(B, num_blocks * size, N, H)[:, :T]


def visible_pairs(mask: Mask, num_blocks: int, size: int) -> np.ndarray:
    """(pairs, 2): the blocks of queries and keys of which ``mask`` leaves something, all keys of one query together."""
    pairs = []
    for i in range(num_blocks):
        first = 0 if mask.window is None else max(0, i * size - mask.window + 1) // size
        last = i if mask.causal else num_blocks - 1
        pairs += [(i, j) for j in range(first, last + 1)]
    return np.array(pairs, np.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _blocked(mask, scale, save_as, q_IBCKGH, k_IBSKH, v_IBSKH, segments_IBC):
    return _forward(mask, scale, save_as, q_IBCKGH, k_IBSKH, v_IBSKH, segments_IBC)[0]


def _forward(mask, scale, save_as, q_IBCKGH, k_IBSKH, v_IBSKH, segments_IBC):
    num_blocks, B, size, K, G, H = q_IBCKGH.shape
    rows = (num_blocks, B, K, G, size)

    def body(state, pair):
        i, j = pair
        max_BKGC, sum_BKGC, out_BKGCH = (part[i] for part in state)
        scores_BKGCS, visible = _scores(mask, scale, q_IBCKGH[i], k_IBSKH[j], segments_IBC[i], segments_IBC[j], i, j)
        new_max_BKGC = jnp.maximum(max_BKGC, scores_BKGCS.max(-1))
        exp_BKGCS = jnp.where(visible, jnp.exp(scores_BKGCS - new_max_BKGC[..., None]), 0.0)
        shrink_BKGC = jnp.exp(max_BKGC - new_max_BKGC)
        new_sum_BKGC = shrink_BKGC * sum_BKGC + exp_BKGCS.sum(-1)
        value_BKGCH = _einsum32("bkgcs,bskh->bkgch", exp_BKGCS.astype(v_IBSKH.dtype), v_IBSKH[j])
        new_out_BKGCH = shrink_BKGC[..., None] * out_BKGCH + value_BKGCH
        new = (new_max_BKGC, new_sum_BKGC, new_out_BKGCH)
        return tuple(part.at[i].set(x) for part, x in zip(state, new, strict=True)), None

    state = (jnp.full(rows, HIDDEN), jnp.zeros(rows), jnp.zeros((*rows, H)))
    (max_, sum_, out), _ = jax.lax.scan(body, state, _pairs(mask, num_blocks, size))
    sees_something = sum_ > 0
    sum_ = jnp.where(sees_something, sum_, 1.0)
    out_IBCKGH = jnp.einsum("ibkgch->ibckgh", out / sum_[..., None]).astype(q_IBCKGH.dtype)
    lse_IBKGC = max_ + jnp.log(sum_)
    if save_as is not None:
        out_IBCKGH, lse_IBKGC = checkpoint_name(out_IBCKGH, save_as), checkpoint_name(lse_IBKGC, save_as)
    return out_IBCKGH, (q_IBCKGH, k_IBSKH, v_IBSKH, segments_IBC, out_IBCKGH, lse_IBKGC)


def _backward(mask, scale, save_as, residuals, dout_IBCKGH):
    q_IBCKGH, k_IBSKH, v_IBSKH, segments_IBC, out_IBCKGH, lse_IBKGC = residuals
    num_blocks, size = q_IBCKGH.shape[0], q_IBCKGH.shape[2]
    delta_IBKGC = _einsum32("ibckgh,ibckgh->ibkgc", out_IBCKGH, dout_IBCKGH)

    def body(gradients, pair):
        i, j = pair
        dq_IBCKGH, dk_IBSKH, dv_IBSKH = gradients
        q_BCKGH, k_BSKH, v_BSKH, dout_BCKGH = q_IBCKGH[i], k_IBSKH[j], v_IBSKH[j], dout_IBCKGH[i]
        scores_BKGCS, visible = _scores(mask, scale, q_BCKGH, k_BSKH, segments_IBC[i], segments_IBC[j], i, j)
        weights_BKGCS = jnp.where(visible, jnp.exp(scores_BKGCS - lse_IBKGC[i][..., None]), 0.0)
        dweights_BKGCS = _einsum32("bckgh,bskh->bkgcs", dout_BCKGH, v_BSKH)
        dscores_BKGCS = scale * weights_BKGCS * (dweights_BKGCS - delta_IBKGC[i][..., None])
        weights_BKGCS, dscores_BKGCS = weights_BKGCS.astype(v_BSKH.dtype), dscores_BKGCS.astype(q_BCKGH.dtype)
        return (
            dq_IBCKGH.at[i].add(_einsum32("bkgcs,bskh->bckgh", dscores_BKGCS, k_BSKH)),
            dk_IBSKH.at[j].add(_einsum32("bkgcs,bckgh->bskh", dscores_BKGCS, q_BCKGH)),
            dv_IBSKH.at[j].add(_einsum32("bkgcs,bckgh->bskh", weights_BKGCS, dout_BCKGH)),
        ), None

    inputs = (q_IBCKGH, k_IBSKH, v_IBSKH)
    gradients = tuple(jnp.zeros(x.shape, jnp.float32) for x in inputs)
    gradients, _ = jax.lax.scan(body, gradients, _pairs(mask, num_blocks, size))
    return *(dx.astype(x.dtype) for dx, x in zip(gradients, inputs, strict=True)), None


_blocked.defvjp(_forward, _backward)

_einsum32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _pairs(mask: Mask, num_blocks: int, size: int) -> tuple[jax.Array, jax.Array]:
    pairs = visible_pairs(mask, num_blocks, size)
    return jnp.asarray(pairs[:, 0]), jnp.asarray(pairs[:, 1])


def _scores(mask, scale, q_BCKGH, k_BSKH, query_segments_BC, key_segments_BS, i, j) -> tuple[jax.Array, jax.Array]:
    """The scores of query block i with key block j in float32, and which of them count."""
    scores_BKGCS = scale * _einsum32("bckgh,bskh->bkgcs", q_BCKGH, k_BSKH)
    positions = jnp.arange(q_BCKGH.shape[1])
    visible_CS = mask.visible(i * positions.size + positions, j * positions.size + positions)
    visible = (visible_CS & same_segment(query_segments_BC, key_segments_BS))[:, None, None]
    return jnp.where(visible, scores_BKGCS, HIDDEN), visible
