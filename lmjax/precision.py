"""The dtypes of a run: parameters and moments are float32; what is computed and reduced in is chosen here."""

from typing import Literal

import jax.numpy as jnp

from lmjax.schema import config_class


@config_class
class PrecisionConfig:
    """Norms, softmax, loss and gradient accumulation stay in float32 whatever is chosen."""

    compute: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of activations and of the parameters in matrix products."""
    gradient_reduction: Literal["compute", "float32"] = "compute"
    """dtype in which devices sum the gradients of matrices: the compute dtype, or float32 at twice the bytes."""

    def __post_init__(self) -> None:
        if self.compute == "float32" and self.gradient_reduction == "float32":
            raise ValueError(
                "gradient_reduction=float32 changes nothing when compute is float32: leave it at its default, compute"
            )

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute)

    @property
    def reduce_in_float32(self) -> bool:
        return self.gradient_reduction == "float32"
