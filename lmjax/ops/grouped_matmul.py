"""Products of the rows of each group with a matrix of its own: the experts' projections.

Legend: M rows, in the order of their groups, E groups, D inputs, F outputs.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmjax.compat import varying_axes

GroupedMatmul = Literal["ragged_dot", "blocks"]
"""``ragged_dot``: the compiler's own, which on a CPU multiplies every row with every matrix. ``blocks``: a loop over
the groups, and in each over blocks of its rows; a group's last block has rows in it that count for nothing."""

BLOCK_ROWS = (512, 128)
"""Rows that ``blocks`` multiplies at a time: a group's rows by the first number as far as that goes, the rest by the
last. With fewer, matrices are read and gradients are added up more often; with more, more counts for nothing."""

BY_PLATFORM: Mapping[str, GroupedMatmul] = {"tpu": "ragged_dot"}
"""Which one a platform takes; ``blocks`` where it is not named."""


def grouped_matmul(
    x_MD: Float[Array, "rows inputs"],
    w_EDF: Float[Array, "groups inputs outputs"],
    sizes_E: Int[Array, " groups"],
    platform: str,
) -> Float[Array, "rows outputs"]:
    """Row m of the result is x[m] @ w[e], e being the group that row m is in: the first sizes[0] rows are in group 0.

    Rows beyond the sum of the sizes are in none: what they become has no meaning, and their x has no gradient.
    Products are summed in float32 and given in the dtype of x, which w has too.
    """
    return IMPLEMENTATIONS[BY_PLATFORM.get(platform, "blocks")](*varying_together(x_MD, w_EDF, sizes_E))


def _ragged_dot(x_MD, w_EDF, sizes_E):
    return jax.lax.ragged_dot(x_MD, w_EDF, sizes_E, preferred_element_type=x_MD.dtype)


@jax.custom_vjp
def _blocks(x_MD, w_EDF, sizes_E):
    return _row_products(x_MD, w_EDF, sizes_E, "md,df->mf", w_EDF.shape[2])


def _blocks_forward(x_MD, w_EDF, sizes_E):
    return _blocks(x_MD, w_EDF, sizes_E), (x_MD, w_EDF, sizes_E)


def _blocks_backward(residuals, dy_MF):
    x_MD, w_EDF, sizes_E = residuals
    dx_MD = _row_products(dy_MF, w_EDF, sizes_E, "mf,df->md", w_EDF.shape[1])
    return dx_MD, _matrix_gradients(x_MD, dy_MF, sizes_E).astype(w_EDF.dtype), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _row_products(rows_MI, w_EDF, sizes_E, equation: str, width: int) -> jax.Array:
    """Each group's rows times its matrix, and zeros in the rows beyond."""

    def of_group(results, group):
        w_DF, start, size = group

        def of_block(results, row, is_in):
            rows, before = (jax.lax.dynamic_slice_in_dim(of, row, len(is_in)) for of in (rows_MI, results))
            products = jnp.einsum(equation, rows, w_DF, preferred_element_type=rows.dtype)
            return jax.lax.dynamic_update_slice_in_dim(results, jnp.where(is_in, products, before), row, axis=0)

        return _over_blocks(of_block, results, start, size, len(rows_MI)), None

    empty, _ = varying_together(jax.lax.empty((len(rows_MI), width), rows_MI.dtype), rows_MI)
    ends_E = jnp.cumsum(sizes_E)
    results, _ = jax.lax.scan(of_group, empty, (w_EDF, ends_E - sizes_E, sizes_E))

    def zeros(results, row, is_in):
        before = jax.lax.dynamic_slice_in_dim(results, row, len(is_in))
        return jax.lax.dynamic_update_slice_in_dim(results, jnp.where(is_in, 0, before), row, axis=0)

    # Most often there are no such rows, and an array of zeros to begin with would be written for nothing.
    return _over_blocks(zeros, results, ends_E[-1], len(rows_MI) - ends_E[-1], len(rows_MI))


def _matrix_gradients(x_MD, dy_MF, sizes_E) -> jax.Array:
    """The sum over each group's rows of their outer products, float32 (groups, inputs, outputs)."""
    zeros, _ = varying_together(jnp.zeros((x_MD.shape[1], dy_MF.shape[1]), jnp.float32), x_MD)

    def of_group(_, group):
        start, size = group

        def of_block(total, row, is_in):
            x, dy = (jax.lax.dynamic_slice_in_dim(of, row, len(is_in)) for of in (x_MD, dy_MF))
            x, dy = jnp.where(is_in, x, 0), jnp.where(is_in, dy, 0)
            return total + jnp.einsum("md,mf->df", x, dy, preferred_element_type=jnp.float32)

        return None, _over_blocks(of_block, zeros, start, size, len(x_MD))

    return jax.lax.scan(of_group, None, (jnp.cumsum(sizes_E) - sizes_E, sizes_E))[1]


def _over_blocks(of_block: Callable[..., jax.Array], carry, start, size, num_rows: int) -> jax.Array:
    """``carry`` after ``of_block(carry, row, is_in)`` for every block of rows ``start`` … ``start + size`` - 1.

    A block begins at ``row``; ``is_in`` (rows of the block, 1) tells which of its rows are meant: each is in one block.
    """
    end = start + size
    blocks = sorted({min(block, num_rows) for block in BLOCK_ROWS}, reverse=True)
    for block in blocks:
        count = (end - start) // block if block > blocks[-1] else -((start - end) // block)

        def numbered(number, carry, block=block, start=start):
            first = start + number * block
            row = jnp.minimum(first, num_rows - block)  # a block that would reach beyond all rows begins earlier
            places = row + jnp.arange(block)[:, None]
            return of_block(carry, row, (places >= first) & (places < end))

        carry = jax.lax.fori_loop(0, count, numbered, carry)
        start += count * block
    return carry


def varying_together(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, inside of a shard_map all of a type that differs over the devices over which one of them does."""
    axes = frozenset().union(*(varying_axes(array) for array in arrays))
    return tuple(
        jax.lax.pcast(array, tuple(sorted(missing)), to="varying") if (missing := axes - varying_axes(array)) else array
        for array in arrays
    )


IMPLEMENTATIONS: Mapping[GroupedMatmul, Callable[..., jax.Array]] = {"ragged_dot": _ragged_dot, "blocks": _blocks}
