"""The vocabulary of intermediate values that a remat policy may name."""

from typing import Literal

from jax.ad_checkpoint import checkpoint_name

Tag = Literal["block_input", "projection", "query", "key", "value", "attention_out", "mlp_gate", "mlp_up", "mlp_hidden"]


def tag(x, name: Tag):
    """``x``, known to ``jax.checkpoint`` policies as ``name``."""
    return checkpoint_name(x, name)
