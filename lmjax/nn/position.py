"""Rotary position embedding."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "batch seq heads head_dim"], positions: Int[Array, "batch seq"], theta: float
) -> Float[Array, "batch seq heads head_dim"]:
    """Rotate the pairs (i, i + head_dim / 2) by position / theta^(2i / head_dim), in float32.

    RoPE (arXiv 2104.09864, equation 34) in the half-split layout of transformers' ``apply_rotary_pos_emb``.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
