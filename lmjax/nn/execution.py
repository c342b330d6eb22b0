"""How a forward pass is carried out: what changes speed, memory and rounding, and never the function."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from lmjax.hardware import CPU, Hardware
from lmjax.ops.experts import ExpertExchange


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerExecution:
    """What a layer has to know about it."""

    compute_dtype: jnp.dtype
    """dtype of activations and of the parameters in matrix products."""
    reduce_in_float32: bool = False
    """Whether devices sum the gradients of matrices in float32 (otherwise in the compute dtype)."""
    attention_kernel: str = "auto"
    """A name of ``lmjax.ops.attention``'s table, or auto."""
    expert_exchange: ExpertExchange | Literal["auto"] = "auto"
    """How tokens reach experts on other devices."""
    hardware: Hardware = CPU
    """What the mesh's devices are. A compile for absent devices cannot ask them."""
