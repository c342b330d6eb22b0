"""From logits to the next token, with random numbers that belong to a prompt and not to its place in a batch.

Legend: B batch, V vocab.
"""

import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt32

from lmjax.mesh import BATCH_AXES


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


def sample(
    logits_BV: Float[Array, "batch vocab"],
    keys_B2: UInt32[Array, "batch 2"],
    step: Int[Array, ""],
    temperature: Float[Array, ""],
) -> Int[Array, " batch"]:
    """A token a row, drawn from softmax(logits / temperature); the most probable one (the first of equals) at 0.

    By the Gumbel-max trick: argmax(logits + temperature * noise), which holds for 0 too. ``step`` numbers the draws of
    a row. The logits are float32, with whole rows on every device; what is -inf is never drawn.
    """

    def local(logits_BV, keys_B2, step, temperature):
        def noise(key_2):
            key = jax.random.fold_in(jax.random.wrap_key_data(key_2, impl="threefry2x32"), step)
            return jax.random.gumbel(key, logits_BV.shape[1:], jnp.float32)

        noisy_BV = logits_BV + temperature * jax.vmap(noise)(keys_B2)
        return jnp.argmax(noisy_BV, axis=-1).astype(jnp.int32)

    rows = P(BATCH_AXES, None)
    return jax.shard_map(local, in_specs=(rows, rows, P(), P()), out_specs=P(BATCH_AXES))(
        logits_BV, keys_B2, step, temperature
    )
