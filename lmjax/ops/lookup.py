"""The rows of a vocabulary table, where no device holds the whole table.

Legend: B batch, T positions, V vocab, D embed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lmjax.mesh import BATCH_AXES, FSDP_AXES
from lmjax.sharding import activation_spec

_TABLE = P("tensor", FSDP_AXES)
_TOKENS = P(BATCH_AXES, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(
    table_VD: Float[Array, "vocab embed"], tokens_BT: Int[Array, "batch seq"], dtype: jnp.dtype
) -> Float[Array, "batch seq embed"]:
    """``table[tokens]`` in ``dtype``, sharded as the residual stream: by sequence over ``tensor`` where that divides.

    ``table`` is sharded P(tensor, FSDP_AXES). Each device looks up the tokens whose rows it holds, and the sum over
    ``tensor`` has them all. The gradient is summed in float32: a frequent token is met thousands of times in a batch.
    """
    out_spec = _residual_spec(table_VD, tokens_BT)

    def local(table_VD, tokens_BT):
        table_VD = jax.lax.all_gather(table_VD.astype(dtype), FSDP_AXES, axis=1, tiled=True)
        rows_BT, held_BT = _rows_held(tokens_BT, table_VD.shape[0])
        x_BTD = jnp.where(held_BT[..., None], table_VD[jnp.where(held_BT, rows_BT, 0)], 0)
        if out_spec[1] is None:
            return jax.lax.psum(x_BTD, "tensor")
        return jax.lax.psum_scatter(x_BTD, "tensor", scatter_dimension=1, tiled=True)

    return jax.shard_map(local, in_specs=(_TABLE, _TOKENS), out_specs=out_spec)(table_VD, tokens_BT)


def _forward(table_VD, tokens_BT, dtype):
    return lookup(table_VD, tokens_BT, dtype), (table_VD, tokens_BT)


def _backward(dtype, residuals, dx_BTD):
    table_VD, tokens_BT = residuals
    dx_spec = _residual_spec(table_VD, tokens_BT)
    num_rows = table_VD.shape[0] // jax.sharding.get_abstract_mesh().shape["tensor"]

    def local(dx_BTD, tokens_BT):
        if dx_spec[1] is not None:
            dx_BTD = jax.lax.all_gather(dx_BTD, "tensor", axis=1, tiled=True)
        rows_BT, held_BT = _rows_held(tokens_BT, num_rows)
        rows_BT = jnp.where(held_BT, rows_BT, num_rows)  # beyond the table: dropped
        table_VD = jnp.zeros((num_rows, dx_BTD.shape[2]), jnp.float32)
        table_VD = table_VD.at[rows_BT].add(dx_BTD.astype(jnp.float32), mode="drop")
        # Split first: over data, which may be the slow network, then goes a part and not the whole table.
        return jax.lax.psum(jax.lax.psum_scatter(table_VD, FSDP_AXES, scatter_dimension=1, tiled=True), "data")

    dtable_VD = jax.shard_map(local, in_specs=(dx_spec, _TOKENS), out_specs=_TABLE)(dx_BTD, tokens_BT)
    return dtable_VD.astype(table_VD.dtype), None


lookup.defvjp(_forward, _backward)


def _residual_spec(table_VD: jax.Array, tokens_BT: jax.Array) -> P:
    return activation_spec(("batch", "seq_residual", "embed"), (*tokens_BT.shape, table_VD.shape[1]))


def _rows_held(tokens_BT: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """The tokens as rows of this device's part of the table, and whether it holds them."""
    rows_BT = tokens_BT - jax.lax.axis_index("tensor") * num_rows
    return rows_BT, (rows_BT >= 0) & (rows_BT < num_rows)
