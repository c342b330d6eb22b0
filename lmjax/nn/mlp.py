"""The feed-forward half of a block."""

import functools
from collections.abc import Callable, Mapping
from typing import Literal

import jax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from lmjax.nn.execution import LayerExecution
from lmjax.nn.param import Projection
from lmjax.nn.tags import tag

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
"""``gelu`` is x times the normal distribution function, ``gelu_tanh`` its approximation by tanh (arXiv 1606.08415)."""

ACTIVATIONS: Mapping[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)), as SwiGLU (arXiv 2002.05202, equation 6); or, not gated, down(act(up(x)))."""

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        *,
        activation: Activation,
        gated: bool,
        bias: bool,
        output_std: float,
        key: PRNGKeyArray,
    ):
        self.activation: Activation = activation
        gate_key, up_key, down_key = jax.random.split(key, 3)
        hidden, shape, axes = ("batch", "seq", "mlp"), (embed_dim, mlp_dim), ("embed", "mlp")
        hidden_bias = ("mlp",) if bias else None
        self.gate = (
            Projection("btd,df->btf", shape, axes, hidden, bias_axes=hidden_bias, key=gate_key) if gated else None
        )
        self.up = Projection("btd,df->btf", shape, axes, hidden, bias_axes=hidden_bias, key=up_key)
        self.down = Projection(
            "btf,fd->btd",
            (mlp_dim, embed_dim),
            ("mlp", "embed"),
            ("batch", "seq_residual", "embed"),
            bias_axes=("norm",) if bias else None,
            std=output_std,
            key=down_key,
        )

    def __call__(self, x_BTD: Float[Array, "batch seq embed"], execution: LayerExecution) -> Float[Array, "..."]:
        activation = ACTIVATIONS[self.activation]
        up_BTF = tag(self.up(x_BTD, execution), "mlp_up")
        if self.gate is None:
            hidden_BTF = activation(up_BTF)
        else:
            hidden_BTF = activation(tag(self.gate(x_BTD, execution), "mlp_gate")) * up_BTF
        return self.down(tag(hidden_BTF, "mlp_hidden"), execution)
