"""From logits to the next token, with random numbers that belong to a prompt and not to its place in a batch.

Legend: B batch, V vocab.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt32

from lmjax.generate.options import Options
from lmjax.mesh import BATCH_AXES


class Sampling(NamedTuple):
    """The distribution that tokens are drawn from, as numbers that a compiled program takes."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    tail: Float[Array, ""]
    """Probability of the least probable tokens that are left out, 1 - top_p; -1 leaves out none."""
    min_p: Float[Array, ""]

    @classmethod
    def of(cls, options: Options, vocab_size: int) -> "Sampling":
        """As NumPy scalars."""
        top_k = vocab_size if options.top_k is None else options.top_k
        tail = -1 if options.top_p in (None, 1) else 1 - options.top_p
        floats = (np.asarray(value, np.float32) for value in (options.temperature, tail, options.min_p or 0))
        temperature, tail, min_p = floats
        return cls(temperature, np.asarray(top_k, np.int32), tail, min_p)  # pyright: ignore[reportArgumentType]


def row_keys(seed: int, prompts: Sequence[Sequence[int]]) -> UInt32[np.ndarray, "prompts 2"]:
    """The data of one random key a prompt, which depends on the seed, the prompt, and how many equal ones precede it.

    So a prompt is continued in the same way alone and among others, and its copies are continued in different ways.
    """
    copies: dict[tuple[int, ...], int] = {}
    keys = np.zeros((len(prompts), 2), np.uint32)
    for row, prompt in enumerate(map(tuple, prompts)):
        copies[prompt] = copies.get(prompt, -1) + 1
        digest = hashlib.blake2b(repr((seed, copies[prompt], prompt)).encode(), digest_size=8).digest()
        keys[row] = np.frombuffer(digest, "<u4")
    return keys


def truncated(logits_BV: Float[Array, "batch vocab"], sampling: Sampling) -> Float[Array, "batch vocab"]:
    """``logits``, -inf for the tokens that are not drawn: of temperature, top-k, top-p and min-p in this order.

    Each step sees the probabilities of what the one before it left, as with transformers' warpers TopK, TopP and MinP.
    Tokens that are exactly as probable as the last one that stays, stay too. The most probable one always does.
    """

    def local(logits_BV, sampling):
        scaled_BV = logits_BV / sampling.temperature
        ascending_BV = jnp.sort(scaled_BV, axis=-1)
        vocab = logits_BV.shape[-1]
        least_B1 = jax.lax.dynamic_slice_in_dim(ascending_BV, vocab - sampling.top_k, 1, -1)
        ascending_BV = jnp.where(ascending_BV < least_B1, -jnp.inf, ascending_BV)
        mass_BV = jnp.cumsum(jax.nn.softmax(ascending_BV, axis=-1), axis=-1)
        stays_BV = (mass_BV > sampling.tail) | (jnp.arange(vocab) == vocab - 1)
        least_B1 = jnp.maximum(least_B1, jnp.min(ascending_BV, axis=-1, keepdims=True, where=stays_BV, initial=jnp.inf))
        share_BV = jnp.exp(scaled_BV - ascending_BV[:, -1:])
        return jnp.where((scaled_BV >= least_B1) & (share_BV >= sampling.min_p), logits_BV, -jnp.inf)

    rows = P(BATCH_AXES, None)
    return jax.shard_map(local, in_specs=(rows, P()), out_specs=rows)(logits_BV, sampling)


def sample(
    logits_BV: Float[Array, "batch vocab"],
    keys_B2: UInt32[Array, "batch 2"],
    step: Int[Array, ""],
    temperature: Float[Array, ""],
) -> Int[Array, " batch"]:
    """A token a row, drawn from softmax(logits / temperature); the most probable one (the first of equals) at 0.

    By the Gumbel-max trick: argmax(logits + temperature * noise), which holds for 0 too, where no noise is made.
    ``step`` numbers the draws of a row. The logits are float32, with whole rows on every device; what is -inf is never
    drawn.
    """

    def local(logits_BV, keys_B2, step, temperature):
        def noise(key_2):
            key = jax.random.fold_in(jax.random.wrap_key_data(key_2, impl="threefry2x32"), step)
            return jax.random.gumbel(key, logits_BV.shape[1:], jnp.float32)

        def noisy():
            return logits_BV + temperature * jax.vmap(noise)(keys_B2)

        drawn_BV = jax.lax.cond(temperature > 0, noisy, lambda: logits_BV)
        return jnp.argmax(drawn_BV, axis=-1).astype(jnp.int32)

    rows = P(BATCH_AXES, None)
    return jax.shard_map(local, in_specs=(rows, rows, P(), P()), out_specs=P(BATCH_AXES))(
        logits_BV, keys_B2, step, temperature
    )
