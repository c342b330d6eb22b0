"""Normalisation over the embedding dimension."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lmjax.nn.param import scale


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32 (arXiv 1910.07467; as transformers' LlamaRMSNorm)."""

    def __init__(self, dim: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = scale(dim)

    def __call__(self, x: Float[Array, "*rows embed"]) -> Float[Array, "*rows embed"]:
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(mean_square + self.epsilon) * self.scale[...]).astype(x.dtype)
