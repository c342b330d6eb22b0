"""Logits from the output table.

Legend: V vocab, D embed.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def logits(
    x: Float[Array, "*rows embed"],
    table_VD: Float[Array, "vocab embed"],
    bias_V: Float[Array, " vocab"] | None,
    softcap: float | None,
    out_spec=None,
) -> Float[Array, "*rows vocab"]:
    """softcap x tanh((x table^T + bias) / softcap) in float32, the product in the dtype of x.

    ``out_spec`` is the partition of the result, where the operands leave it open.
    """
    logits = jnp.einsum(
        "...d,vd->...v", x, table_VD.astype(x.dtype), preferred_element_type=jnp.float32, out_sharding=out_spec
    )
    if bias_V is not None:
        logits = logits + bias_V.astype(jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)
