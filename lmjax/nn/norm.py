"""Normalisation over the embedding dimension, or over (heads, head_dim)."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lmjax.nn.param import constant

NormKind = Literal["rms", "layer"]


class Norm(nnx.Module):
    """x / rms(x) x scale, or (x - mean(x)) / std(x) x scale + bias, in float32, over the last dimensions.

    ``rms`` is RMSNorm (arXiv 1910.07467; transformers' LlamaRMSNorm, and with ``unit_offset`` GemmaRMSNorm, whose
    parameter is the scale minus 1). ``layer`` is LayerNorm (arXiv 1607.06450; torch.nn.LayerNorm).
    """

    def __init__(
        self,
        kind: NormKind,
        shape: tuple[int, ...],
        epsilon: float,
        *,
        unit_offset: bool = False,
        bias: bool = False,
        axes: tuple[str, ...] = ("norm",),
    ):
        self.kind = kind
        self.epsilon = epsilon
        self.offset = 1.0 if unit_offset else 0.0
        self.scale = constant(1.0 - self.offset, shape, axes)
        self.bias = constant(0.0, shape, axes) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        x32 = x.astype(jnp.float32)
        scale = self.scale[...]
        dims = tuple(range(-scale.ndim, 0))
        if self.kind == "layer":
            x32 = x32 - jnp.mean(x32, axis=dims, keepdims=True)
        mean_square = jnp.mean(x32 * x32, axis=dims, keepdims=True)
        y = x32 * jax.lax.rsqrt(mean_square + self.epsilon) * (scale + self.offset if self.offset else scale)
        return (y if self.bias is None else y + self.bias[...]).astype(x.dtype)
