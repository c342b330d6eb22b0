"""The feed-forward half of a block."""

import jax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from lmjax.nn.execution import LayerExecution
from lmjax.nn.param import Projection
from lmjax.nn.tags import tag


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x)): SwiGLU (arXiv 2002.05202, equation 6)."""

    def __init__(self, embed_dim: int, mlp_dim: int, *, output_std: float, key: PRNGKeyArray):
        gate_key, up_key, down_key = jax.random.split(key, 3)
        hidden, shape, axes = ("batch", "seq", "mlp"), (embed_dim, mlp_dim), ("embed", "mlp")
        self.gate = Projection("btd,df->btf", shape, axes, hidden, key=gate_key)
        self.up = Projection("btd,df->btf", shape, axes, hidden, key=up_key)
        output = ("batch", "seq_residual", "embed")
        self.down = Projection(
            "btf,fd->btd", (mlp_dim, embed_dim), ("mlp", "embed"), output, std=output_std, key=down_key
        )

    def __call__(self, x_BTD: Float[Array, "batch seq embed"], execution: LayerExecution) -> Float[Array, "..."]:
        gate_BTF = tag(self.gate(x_BTD, execution), "mlp_gate")
        up_BTF = tag(self.up(x_BTD, execution), "mlp_up")
        return self.down(tag(jax.nn.silu(gate_BTF) * up_BTF, "mlp_hidden"), execution)
