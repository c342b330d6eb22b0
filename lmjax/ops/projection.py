"""A matrix product of activations with a parameter."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lmjax.mesh import FSDP_AXES


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
    return _project(equation, out_spec, jnp.dtype(jnp.float32) if reduce_f32 else x.dtype, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _project(
    equation: str, out_spec: PartitionSpec, gradient_dtype: jnp.dtype, x: jax.Array, w: jax.Array
) -> jax.Array:
    return jnp.einsum(equation, x, _gathered(w, x.dtype), out_sharding=out_spec)


def _forward(equation, out_spec, gradient_dtype, x, w):
    return _project(equation, out_spec, gradient_dtype, x, w), (x, w)


def _backward(equation, out_spec, gradient_dtype, residuals, dy):
    x, w = residuals
    inputs, y_letters = equation.split("->")
    x_letters, w_letters = inputs.split(",")
    kernel, x_sharding = _gathered(w, x.dtype), jax.typeof(x).sharding
    dx = jnp.einsum(f"{y_letters},{w_letters}->{x_letters}", dy, kernel, out_sharding=x_sharding)
    # In this order of operands (JAX's own rule has the other), a CPU transposes x for the product and not the wider dy.
    dw = jnp.einsum(
        f"{x_letters},{y_letters}->{w_letters}",
        x,
        dy,
        preferred_element_type=gradient_dtype,
        out_sharding=jax.typeof(w).sharding,
    )
    return dx, dw.astype(w.dtype)


_project.defvjp(_forward, _backward)


def _gathered(w: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """``w`` in ``dtype``, whole over fsdp and expert.

    Left to itself, the TPU compiler multiplies with the part of one device after that of another and adds the results
    up in ``dtype``: more rounding, and twice the time of the one product.
    """
    spec = jax.typeof(w).sharding.spec
    return jax.sharding.reshard(w.astype(dtype), PartitionSpec(*(None if axis == FSDP_AXES else axis for axis in spec)))
