"""Attention on TPU by the block-sparse kernel that comes with JAX (Pallas, "splash").

Legend: B batch, T positions, N query heads, K kv heads, H head_dim.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from lmjax.ops.attention_mask import Mask

LANES = 128
"""Positions that one vector register of a TPU holds; lengths and blocks are multiples of it."""

BLOCK_SIZES = (1024, 512, 256, 128)
"""Block lengths, the best first; a row's length has to be a multiple of its block."""


def splash_attention(
    q_BTNH: Float[Array, "batch T heads head_dim"],
    k_BTKH: Float[Array, "batch T kv_heads head_dim"],
    v_BTKH: Float[Array, "batch T kv_heads value_dim"],
    segment_ids_BT: Int[Array, "batch T"] | None,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    save_as: str | None = None,
    interpret: bool = False,
) -> Float[Array, "batch T heads value_dim"]:
    """What ``reference_attention`` gives. ``interpret`` runs the kernel's program on any platform, slowly."""
    T, N = q_BTNH.shape[1:3]
    attend = kernel.make_splash_mha_single_device(
        masks.MultiHeadMask([_mask(mask, T)] * N),
        block_sizes=_block_sizes(T),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=save_as,
        interpret=interpret,
    )
    q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)  # the kernel has no scale of its own
    segments = None if segment_ids_BT is None else kernel.SegmentIds(segment_ids_BT, segment_ids_BT)
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    out_BNTH: Any = jax.vmap(attend)(*heads_first, segments)
    out_BTNH = jnp.swapaxes(out_BNTH, 1, 2)
    if segment_ids_BT is None:
        return out_BTNH
    # To the kernel padding is a segment like any other.
    return jnp.where((segment_ids_BT != 0)[:, :, None, None], out_BTNH, 0)


def _mask(mask: Mask, length: int) -> masks.Mask:
    shape = (length, length)
    if not mask.causal:
        return masks.FullMask(shape)
    if mask.window is None:
        return masks.CausalMask(shape)
    return masks.LocalMask(shape, window_size=(mask.window - 1, 0), offset=0)


def _block_sizes(length: int) -> kernel.BlockSizes:
    block = next(size for size in BLOCK_SIZES if length % size == 0)
    compute = min(block, 512)
    return kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=compute,
        block_q_dq=block,
        block_kv_dq=block,
    )
