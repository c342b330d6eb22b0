"""Attention on NVIDIA GPUs by cuDNN, through JAX's own function for it.

Legend: B batch, T positions, N query heads, K kv heads, H head_dim.
"""

from typing import Literal

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from lmjax.ops.attention_mask import Mask


def cudnn_attention(
    q_BTNH: Float[Array, "batch T heads head_dim"],
    k_BTKH: Float[Array, "batch T kv_heads head_dim"],
    v_BTKH: Float[Array, "batch T kv_heads head_dim"],
    segment_ids_BT: None,
    *,
    mask: Mask,
    scale: float,
    save_as: str | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "batch T heads head_dim"]:
    """What ``reference_attention`` gives, for whole rows of one document. ``implementation`` is JAX's name for it."""
    assert segment_ids_BT is None
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        scale=scale,
        is_causal=mask.causal,
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation=implementation,
    )
    return out_BTNH if save_as is None else checkpoint_name(out_BTNH, save_as)
