"""Dispatch with capacity as GShard (arXiv 2006.16668, algorithm 1) and Switch write it: products with one-hot tensors.

Legend: B batch, T positions, K choices of a token, E experts, C capacity, D embed, F outputs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def one_hot_slots(
    experts_BTK: Int[Array, "batch seq choices"], valid_BT: Bool[Array, "batch seq"], num_experts: int, capacity: int
) -> Float[Array, "batch seq choices experts capacity"]:
    """1 where a choice has that slot of that expert; nowhere for a choice that is dropped."""
    B, T, K = experts_BTK.shape
    chosen_BTKE = jax.nn.one_hot(experts_BTK, num_experts, dtype=jnp.int32) * valid_BT[..., None, None]
    chosen_BIE = chosen_BTKE.swapaxes(1, 2).reshape(B, K * T, num_experts)
    before_BIE = jnp.cumsum(chosen_BIE, axis=1) - chosen_BIE
    slots_BIEC = jax.nn.one_hot(before_BIE, capacity) * chosen_BIE[..., None]
    return slots_BIEC.reshape(B, K, T, num_experts, capacity).swapaxes(1, 2)


def one_hot_experts(
    x_BTD: Float[Array, "batch seq embed"],
    weights_BTK: Float[Array, "batch seq choices"],
    w_EDF: Float[Array, "experts embed outputs"],
    slots_BTKEC: Float[Array, "batch seq choices experts capacity"],
) -> Float[Array, "batch seq outputs"]:
    """The sum over each token's choices that have a slot of weight x tanh(x @ w)."""
    rows_EBCD = jnp.einsum("btkec,btd->ebcd", slots_BTKEC, x_BTD)
    results_EBCF = jnp.tanh(jnp.einsum("ebcd,edf->ebcf", rows_EBCD, w_EDF))
    return jnp.einsum("btkec,btk,ebcf->btf", slots_BTKEC, weights_BTK, results_EBCF)


def dense_experts(
    x_BTD: Float[Array, "batch seq embed"],
    weights_BTK: Float[Array, "batch seq choices"],
    w_EDF: Float[Array, "experts embed outputs"],
    experts_BTK: Int[Array, "batch seq choices"],
    valid_BT: Bool[Array, "batch seq"],
) -> Float[Array, "batch seq outputs"]:
    """The same with every token through every expert, one after the other, and no choice dropped."""
    y_BTF = jnp.zeros((*x_BTD.shape[:2], w_EDF.shape[2]))
    for number, w_DF in enumerate(w_EDF):
        is_choice_BTK = (experts_BTK == number) & valid_BT[..., None]
        weight_BT = jnp.sum(jnp.where(is_choice_BTK, weights_BTK, 0), axis=-1)
        y_BTF += weight_BT[..., None] * jnp.tanh(x_BTD @ w_DF)
    return y_BTF
