"""Parameters: float32 arrays that carry the logical axes of their dimensions."""

import functools
import math
import statistics
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from lmjax import compat as _compat  # noqa: F401  (puts nnx into tree mode before the first module is made)
from lmjax.nn.execution import LayerExecution
from lmjax.nn.tags import tag
from lmjax.ops.projection import project
from lmjax.sharding import activation_spec

InitScheme = Literal["gpt2", "olmo2"]
"""``gpt2``: normal, 0.02, the two projections into the residual stream divided by sqrt(2 x layers) (GPT-2 report,
section 2.3). ``olmo2``: normal, 0.02, for every matrix (arXiv 2501.00656, section 3.2). Routers have their own:
``nn.moe.Router``."""

STD = 0.02


def residual_std(scheme: InitScheme, num_layers: int) -> float:
    """Standard deviation of the projections whose output is added to the residual stream."""
    return STD / math.sqrt(2 * num_layers) if scheme == "gpt2" else STD


def matrix(key: PRNGKeyArray, shape: tuple[int, ...], axes: tuple[str, ...], std: float = STD) -> nnx.Param:
    """A normally distributed parameter. ``axes`` names each dimension of ``shape``."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(std * _normal(key, shape), axes=axes)


def _normal(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Standard normal numbers: 16 random bits choose one of as many equally probable quantiles.

    The same bits on every mesh. ``jax.random.normal`` evaluates a function whose last bit depends on how the compiler
    vectorises the part that a device computes.
    """
    bits = jax.random.bits(key, shape, jnp.uint16)
    return jnp.asarray(_normal_quantiles()).at[bits].get(mode="promise_in_bounds")


@functools.cache
def _normal_quantiles() -> np.ndarray:
    """The middles of 2^16 equally probable parts: deviation 0.99999, kurtosis 2.999, all within 4.33."""
    count = 2**16
    inverse = statistics.NormalDist().inv_cdf
    return np.array([inverse((i + 0.5) / count) for i in range(count)], np.float32)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A scale, a bias, or another parameter that is ``value`` everywhere at first."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


class Projection(nnx.Module):
    """A matrix product over named dimensions, such as ``btd,dnh->btnh``, and a bias where ``bias_axes`` names its axes.

    The bias has the last dimensions of the result; one that is added to the residual stream has the axis ``norm``,
    since every device needs all of it.
    """

    def __init__(
        self,
        equation: str,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        output_axes: tuple[str, ...],
        *,
        bias_axes: tuple[str, ...] | None = None,
        std: float = STD,
        key: PRNGKeyArray,
    ):
        self.equation = equation
        self.output_axes = output_axes
        self.kernel = matrix(key, shape, axes, std)
        self.bias = (
            None if bias_axes is None else constant(0.0, _bias_shape(equation, shape, len(bias_axes)), bias_axes)
        )

    def __call__(self, x: Float[Array, "..."], execution: LayerExecution) -> Float[Array, "..."]:
        kernel = self.kernel[...]
        inputs, output = self.equation.split("->")
        x_letters, kernel_letters = inputs.split(",")
        sizes = dict(zip(kernel_letters, kernel.shape, strict=True)) | dict(zip(x_letters, x.shape, strict=True))
        out_spec = activation_spec(self.output_axes, tuple(sizes[letter] for letter in output))
        y = tag(project(self.equation, x, kernel, out_spec, reduce_f32=execution.reduce_in_float32), "projection")
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def _bias_shape(equation: str, shape: tuple[int, ...], num_dims: int) -> tuple[int, ...]:
    inputs, output = equation.split("->")
    sizes = dict(zip(inputs.split(",")[1], shape, strict=True))
    return tuple(sizes[letter] for letter in output[-num_dims:])
