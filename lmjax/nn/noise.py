"""What is drawn in training: dropout, and keys for other noise. It depends on the row and the place, and nothing else.

Legend: B batch, T positions, D embed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


class Noise(NamedTuple):
    """The noise of one forward pass of training: one key a row, so that micro-batches draw what their rows would draw
    in one large batch, and every mesh the same."""

    keys_B: PRNGKeyArray
    rate: float
    """Part of the numbers that dropout zeroes."""

    def dropout(self, x_BTD: Float[Array, "batch seq embed"], place: jax.Array) -> Float[Array, "batch seq embed"]:
        """``x`` with a part ``rate`` of its numbers zeroed and the rest divided by 1 - rate (arXiv 1207.0580)."""
        if not self.rate:
            return x_BTD
        keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(self.keys_B, place)
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x_BTD.shape[1:]))(keys_B)
        kept = jax.sharding.reshard(kept, jax.typeof(x_BTD).sharding.spec)
        return jnp.where(kept, x_BTD / (1 - self.rate), 0).astype(x_BTD.dtype)

    def keys(self, place: jax.Array) -> PRNGKeyArray:
        """Keys, one a row, for what else is drawn in a place."""
        fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
        return fold(fold(self.keys_B, place), 1)
