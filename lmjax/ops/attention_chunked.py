"""Attention by blocks of queries and keys with a running softmax: memory linear in the length, backward pass included.

Legend: B batch, T positions, N query heads, K kv heads, G query heads per kv head, H head_dim, of values another one;
I blocks, C positions of a block (of queries), S positions of a block (of keys).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from lmjax.ops.attention_mask import Mask, visible_pairs
from lmjax.ops.attention_scores import HIDDEN, adjusted, expanded

BLOCK = 512
"""Positions of a block: the matrix products are large, and the scores of a pair of blocks still small."""


def chunked_attention(
    q_BTNH: Float[Array, "batch T heads head_dim"],
    k_BTKH: Float[Array, "batch T kv_heads head_dim"],
    v_BTKH: Float[Array, "batch T kv_heads value_dim"],
    segment_ids_BT: Int[Array, "batch T"] | None,
    prefix_BT: Bool[Array, "batch T"] | None = None,
    slopes_N: Float[Array, " heads"] | None = None,
    sinks_N: Float[Array, " heads"] | None = None,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    save_as: str | None = None,
    block: int = BLOCK,
) -> Float[Array, "batch T heads value_dim"]:
    """What ``reference_attention`` gives, visiting only the pairs of blocks that ``mask`` does not hide entirely.

    FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2) with the pairs in one scan, so that the compiled program is
    as small for long rows as for short ones.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    slopes_KG, sinks_KG = (None if x is None else x.reshape(K, N // K) for x in (slopes_N, sinks_N))
    num_blocks = -(-T // block)
    size = -(-T // num_blocks)
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones((B, T), jnp.int32)

    def blocks(x_BT):
        """(batch, positions, ...) to (blocks, batch, block's positions, ...); segment 0 fills the last block."""
        x_BT = jnp.pad(x_BT, ((0, 0), (0, num_blocks * size - T)) + ((0, 0),) * (x_BT.ndim - 2))
        return x_BT.reshape(B, num_blocks, size, *x_BT.shape[2:]).swapaxes(0, 1)

    out_IBCKGH: jax.Array = _blocked(
        Options(mask, scale, softcap, save_as),
        blocks(q_BTNH.reshape(B, T, K, N // K, H)),
        blocks(k_BTKH),
        blocks(v_BTKH),
        blocks(segment_ids_BT),
        None if prefix_BT is None else blocks(prefix_BT),
        slopes_KG,
        sinks_KG,
    )
    return out_IBCKGH.swapaxes(0, 1).reshape(B, num_blocks * size, N, v_BTKH.shape[3])[:, :T]


class Options(NamedTuple):
    """What is known while compiling."""

    mask: Mask
    scale: float
    softcap: float | None
    save_as: str | None


class Inputs(NamedTuple):
    """The arrays, by blocks."""

    q_IBCKGH: jax.Array
    k_IBSKH: jax.Array
    v_IBSKH: jax.Array
    segments_IBC: jax.Array
    prefix_IBS: jax.Array | None
    slopes_KG: jax.Array | None
    sinks_KG: jax.Array | None


def block_pairs(mask: Mask, has_prefix: bool, num_blocks: int, size: int) -> np.ndarray:
    """(pairs, 2): the blocks of queries and keys of which ``mask`` leaves something, all keys of one query together.

    A prefix may reach into every block.
    """
    pairs = []
    for i in range(num_blocks):
        first = 0 if mask.window is None or has_prefix else max(0, i * size - mask.window + 1) // size
        last = i if mask.causal and not has_prefix else num_blocks - 1
        pairs += [(i, j) for j in range(first, last + 1)]
    return np.array(pairs, np.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(options: Options, *inputs):
    return _forward(options, *inputs)[0]


def _forward(options: Options, *arrays):
    inputs = Inputs(*arrays)
    num_blocks, B, size, K, G, _ = inputs.q_IBCKGH.shape
    rows = (num_blocks, B, K, G, size)

    def body(state, pair):
        i, j = pair
        max_BKGC, sum_BKGC, out_BKGCH = (part[i] for part in state)
        distance_CS, visible = _visible(options, inputs, i, j)
        products_BKGCS = options.scale * _einsum32("bckgh,bskh->bkgcs", inputs.q_IBCKGH[i], inputs.k_IBSKH[j])
        scores_BKGCS = adjusted(products_BKGCS, distance_CS, softcap=options.softcap, slopes_KG=inputs.slopes_KG)
        scores_BKGCS = jnp.where(visible, scores_BKGCS, HIDDEN)
        new_max_BKGC = jnp.maximum(max_BKGC, scores_BKGCS.max(-1))
        exp_BKGCS = jnp.where(visible, jnp.exp(scores_BKGCS - new_max_BKGC[..., None]), 0.0)
        shrink_BKGC = jnp.exp(max_BKGC - new_max_BKGC)
        new_sum_BKGC = shrink_BKGC * sum_BKGC + exp_BKGCS.sum(-1)
        v_BSKH = inputs.v_IBSKH[j]
        value_BKGCH = _einsum32("bkgcs,bskh->bkgch", exp_BKGCS.astype(v_BSKH.dtype), v_BSKH)
        new_out_BKGCH = shrink_BKGC[..., None] * out_BKGCH + value_BKGCH
        new = (new_max_BKGC, new_sum_BKGC, new_out_BKGCH)
        return tuple(part.at[i].set(x) for part, x in zip(state, new, strict=True)), None

    if inputs.sinks_KG is None:
        first_max, first_sum = jnp.full(rows, HIDDEN), jnp.zeros(rows)
    else:  # a sink is a key that was seen already, and has no value
        first_max = jnp.broadcast_to(inputs.sinks_KG[:, :, None].astype(jnp.float32), rows)
        first_sum = jnp.ones(rows)
    state = (first_max, first_sum, jnp.zeros((*rows, inputs.v_IBSKH.shape[-1])))
    (max_, sum_, out), _ = jax.lax.scan(body, state, _pairs(options, inputs))
    sees_something = sum_ > 0
    sum_ = jnp.where(sees_something, sum_, 1.0)
    out_IBCKGH = jnp.einsum("ibkgch->ibckgh", out / sum_[..., None]).astype(inputs.q_IBCKGH.dtype)
    lse_IBKGC = max_ + jnp.log(sum_)
    if options.save_as is not None:
        out_IBCKGH = checkpoint_name(out_IBCKGH, options.save_as)
        lse_IBKGC = checkpoint_name(lse_IBKGC, options.save_as)
    return out_IBCKGH, (inputs, out_IBCKGH, lse_IBKGC)


def _backward(options: Options, residuals, dout_IBCKGH):
    inputs, out_IBCKGH, lse_IBKGC = residuals
    delta_IBKGC = _einsum32("ibckgh,ibckgh->ibkgc", out_IBCKGH, dout_IBCKGH)

    def body(gradients, pair):
        i, j = pair
        dq_IBCKGH, dk_IBSKH, dv_IBSKH = gradients
        q_BCKGH, k_BSKH, v_BSKH = inputs.q_IBCKGH[i], inputs.k_IBSKH[j], inputs.v_IBSKH[j]
        dout_BCKGH = dout_IBCKGH[i]
        distance_CS, visible = _visible(options, inputs, i, j)
        adjust = functools.partial(adjusted, distance=distance_CS, softcap=options.softcap, slopes_KG=inputs.slopes_KG)
        products_BKGCS = options.scale * _einsum32("bckgh,bskh->bkgcs", q_BCKGH, k_BSKH)
        scores_BKGCS, to_products = jax.vjp(adjust, products_BKGCS)
        weights_BKGCS = jnp.where(visible, jnp.exp(scores_BKGCS - lse_IBKGC[i][..., None]), 0.0)
        dweights_BKGCS = _einsum32("bckgh,bskh->bkgcs", dout_BCKGH, v_BSKH)
        dscores_BKGCS = weights_BKGCS * (dweights_BKGCS - delta_IBKGC[i][..., None])
        dproducts_BKGCS = (options.scale * to_products(dscores_BKGCS)[0]).astype(q_BCKGH.dtype)
        weights_BKGCS = weights_BKGCS.astype(v_BSKH.dtype)
        return (
            dq_IBCKGH.at[i].add(_einsum32("bkgcs,bskh->bckgh", dproducts_BKGCS, k_BSKH)),
            dk_IBSKH.at[j].add(_einsum32("bkgcs,bckgh->bskh", dproducts_BKGCS, q_BCKGH)),
            dv_IBSKH.at[j].add(_einsum32("bkgcs,bckgh->bskh", weights_BKGCS, dout_BCKGH)),
        ), None

    differentiated = inputs[:3]
    gradients = tuple(jnp.zeros(x.shape, jnp.float32) for x in differentiated)
    gradients, _ = jax.lax.scan(body, gradients, _pairs(options, inputs))
    gradients = tuple(dx.astype(x.dtype) for dx, x in zip(gradients, differentiated, strict=True))
    dsinks_KG = None
    if (sinks_KG := inputs.sinks_KG) is not None:
        sink_weights_IBKGC = jnp.exp(sinks_KG[:, :, None].astype(jnp.float32) - lse_IBKGC)
        dsinks_KG = -jnp.einsum("ibkgc,ibkgc->kg", sink_weights_IBKGC, delta_IBKGC).astype(sinks_KG.dtype)
    return *gradients, None, None, None, dsinks_KG


_blocked.defvjp(_forward, _backward)

_einsum32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _pairs(options: Options, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    num_blocks, _, size = inputs.q_IBCKGH.shape[:3]
    pairs = block_pairs(options.mask, inputs.prefix_IBS is not None, num_blocks, size)
    return jnp.asarray(pairs[:, 0]), jnp.asarray(pairs[:, 1])


def _visible(options: Options, inputs: Inputs, i, j) -> tuple[jax.Array, jax.Array]:
    """The distance from each key of block j to each query of block i, and which keys a query sees."""
    size = inputs.q_IBCKGH.shape[2]
    distance_CS = (i - j) * size + jnp.arange(size)[:, None] - jnp.arange(size)
    prefix_BS = None if inputs.prefix_IBS is None else inputs.prefix_IBS[j]
    visible = visible_pairs(options.mask, distance_CS, inputs.segments_IBC[i], inputs.segments_IBC[j], prefix_BS)
    return distance_CS, expanded(visible)
