"""Bringing the tokens to their experts and the results back, on one device: two ways with one meaning.

Dropless: rows are sorted by expert. With capacity: each expert has so many slots in every sequence, and a choice that
finds none is dropped. Either way rows are gathered, forward and backward; nothing is scattered but row numbers.

Legend: B batch, T positions, K choices of a token, E experts, C capacity, N tokens (B x T), M rows of experts, D embed.
"""

import functools
import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Dispatch(NamedTuple):
    """Which row of the experts' input each choice is; a number beyond the end of what it counts stands for none."""

    row_of_choice: Int[Array, "tokens choices"]
    choice_of_row: Int[Array, " rows"]
    """Token x choices + choice."""
    sizes: Int[Array, " experts"]
    """Rows of each expert, which lie one after the other."""
    kept: Bool[Array, "batch seq choices"] | None
    """Choices that have a row; None where none was dropped."""


def capacity_of(length: int, num_experts: int, experts_per_token: int, factor: float) -> int:
    """Slots of an expert in a sequence: ``factor`` times its even share of the choices, rounded up (Switch, equation
    3), and no more than it can use, one a token."""
    share = Fraction(str(factor)) * length * experts_per_token / num_experts  # 1.1 x 100 is 110, and not a bit more
    return min(math.ceil(share), length)


def dropless(
    experts_BTK: Int[Array, "batch seq choices"], valid_BT: Bool[Array, "batch seq"], num_experts: int
) -> Dispatch:
    """A row for every choice of a valid token, sorted by expert and then by token; the rows that are left are last."""
    num_rows = experts_BTK.size
    expert_I = jnp.where(valid_BT[..., None], experts_BTK, num_experts).reshape(-1)
    order_I, place_I, start = _sorted(expert_I, num_experts)
    row_I = jnp.where(expert_I < num_experts, place_I, num_rows)
    choice_of_row = jnp.where(jnp.arange(num_rows) < start[-1], order_I, num_rows)
    return Dispatch(row_I.reshape(-1, experts_BTK.shape[2]), choice_of_row, jnp.diff(start), None)


def with_capacity(
    experts_BTK: Int[Array, "batch seq choices"], valid_BT: Bool[Array, "batch seq"], num_experts: int, capacity: int
) -> Dispatch:
    """``capacity`` rows for every expert and sequence, (expert, sequence, slot).

    First choices come before second ones, and among these earlier tokens before later ones (GShard, arXiv 2006.16668
    algorithm 1).
    """
    B, T, K = experts_BTK.shape
    num_rows, num_choices = num_experts * B * capacity, B * T * K
    by_priority_BKT = jnp.where(valid_BT[..., None], experts_BTK, num_experts).swapaxes(1, 2)
    expert_BI = by_priority_BKT.reshape(B, K * T)
    _, place_BI, start_BE = jax.vmap(lambda expert_I: _sorted(expert_I, num_experts))(expert_BI)
    slot_BI = place_BI - jnp.take_along_axis(start_BE, expert_BI, axis=1)
    is_kept_BI = (expert_BI < num_experts) & (slot_BI < capacity)
    row_BI = (expert_BI * B + jnp.arange(B)[:, None]) * capacity + slot_BI
    row_BTK = jnp.where(is_kept_BI, row_BI, num_rows).reshape(B, K, T).swapaxes(1, 2)
    choices = jnp.arange(num_choices, dtype=jnp.int32)
    choice_of_row = jnp.full(num_rows, num_choices, jnp.int32).at[row_BTK.reshape(-1)].set(choices, mode="drop")
    sizes = jnp.full(num_experts, B * capacity, jnp.int32)
    return Dispatch(row_BTK.reshape(-1, K), choice_of_row, sizes, row_BTK < num_rows)


def to_experts(x_ND: Float[Array, "tokens embed"], dispatch: Dispatch) -> Float[Array, "rows embed"]:
    """The experts' input: each row is its choice's token, or zeros where it has none."""
    num_choices = dispatch.row_of_choice.shape[1]
    return take_rows(x_ND, dispatch.choice_of_row // num_choices, dispatch.row_of_choice)


def from_experts(
    y_MD: Float[Array, "rows embed"], weights_NK: Float[Array, "tokens choices"], dispatch: Dispatch
) -> Float[Array, "tokens embed"]:
    """The sum of each token's results times their weights, in float32, and given in the dtype of y."""
    y_ND = take_rows(y_MD, dispatch.row_of_choice.reshape(-1), dispatch.choice_of_row[:, None])
    y_NKD = y_ND.reshape(*dispatch.row_of_choice.shape, -1)
    return jnp.einsum("nkd,nk->nd", y_NKD, weights_NK, preferred_element_type=jnp.float32).astype(y_MD.dtype)


@jax.custom_vjp
def take_rows(
    x_ND: Float[Array, "rows embed"], index_M: Int[Array, " taken"], inverse_NR: Int[Array, "rows times"]
) -> Float[Array, "taken embed"]:
    """``x[index]``, with zeros where the index is beyond x. ``inverse[n]`` are all places of the result that are x[n],
    filled up with numbers beyond it; so the gradient is a gather and a sum, where JAX's own would add row by row."""
    return x_ND.at[index_M].get(mode="fill", fill_value=0)


def _take_rows_forward(x_ND, index_M, inverse_NR):
    return take_rows(x_ND, index_M, inverse_NR), inverse_NR


def _take_rows_backward(inverse_NR, dy_MD):
    """One gather for each of R, so that gathers and sum become one loop."""
    taken = [dy_MD.at[inverse_N].get(mode="fill", fill_value=0).astype(jnp.float32) for inverse_N in inverse_NR.T]
    return functools.reduce(jnp.add, taken).astype(dy_MD.dtype), None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def _sorted(expert_I: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choices in the order of their experts; the place of each choice in it; and the place at which each expert begins,
    with the end of the last one, after which come choices of the number ``num_experts``. All int32."""
    order_I = jnp.argsort(expert_I, stable=True).astype(jnp.int32)
    places = jnp.arange(expert_I.size, dtype=jnp.int32)
    place_I = jnp.zeros_like(places).at[order_I].set(places, unique_indices=True)
    start = jnp.searchsorted(expert_I[order_I], jnp.arange(num_experts + 1)).astype(jnp.int32)
    return order_I, place_I, start
