"""A matrix product of activations with a parameter."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float


def project(
    equation: str,
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    out_spec: PartitionSpec,
    *,
    reduce_f32: bool,
) -> Float[Array, "..."]:
    """``jnp.einsum(equation, x, w)`` in the dtype of x, sharded by ``out_spec``. Every letter is in two of the three.

    The gradient of ``w`` is computed and summed over devices in the dtype of x, or with ``reduce_f32`` in float32, at
    twice the bytes.
    """
    if reduce_f32:
        return _project_f32(equation, out_spec, x, w)
    return jnp.einsum(equation, x, _gathered(w, x.dtype), out_sharding=out_spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _project_f32(equation: str, out_spec: PartitionSpec, x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, _gathered(w, x.dtype), out_sharding=out_spec)


def _forward(equation, out_spec, x, w):
    return _project_f32(equation, out_spec, x, w), (x, w)


def _backward(equation, out_spec, residuals, dy):
    x, w = residuals
    inputs, y_letters = equation.split("->")
    x_letters, w_letters = inputs.split(",")
    kernel, x_sharding = _gathered(w, x.dtype), jax.typeof(x).sharding
    dx = jnp.einsum(f"{y_letters},{w_letters}->{x_letters}", dy, kernel, out_sharding=x_sharding)
    dw = jnp.einsum(
        f"{x_letters},{y_letters}->{w_letters}",
        x,
        dy,
        preferred_element_type=jnp.float32,
        out_sharding=jax.typeof(w).sharding,
    )
    return dx, dw.astype(w.dtype)


_project_f32.defvjp(_forward, _backward)


def _gathered(w: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``w`` in ``dtype``, whole over fsdp.

    Left to itself, the TPU compiler multiplies with the part of one device after that of another and adds the results
    up in ``dtype``: more rounding, and twice the time of the one product.
    """
    spec = jax.typeof(w).sharding.spec
    return jax.sharding.reshard(w.astype(dtype), PartitionSpec(*(None if axis == "fsdp" else axis for axis in spec)))
