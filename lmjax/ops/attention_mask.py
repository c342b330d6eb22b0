"""Which keys a query may see.

Legend: B batch, T query positions, S key positions.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lmjax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """The part of a mask that is the same for every row, and so is known while compiling."""

    causal: bool = True
    """Whether query i sees no key after position i."""
    window: int | None = None
    """How many positions a query sees, its own included: query i sees key j where i - window < j <= i (Mistral)."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise InputError(f"attention mask: window is {self.window}; a query sees at least itself, so 1 or more")
        if self.window is not None and not self.causal:
            raise InputError("attention mask: a window looks back from the query, so it needs causal=True")

    def visible(self, queries_T: Int[Array, " T"], keys_S: Int[Array, " S"]) -> Bool[Array, "T S"]:
        """Whether the query at each position sees the key at each position."""
        distance_TS = queries_T[:, None] - keys_S[None, :]
        visible_TS = distance_TS >= 0 if self.causal else jnp.ones(distance_TS.shape, bool)
        return visible_TS if self.window is None else visible_TS & (distance_TS < self.window)


def same_segment(
    query_segments_BT: Int[Array, "batch T"], key_segments_BS: Int[Array, "batch S"]
) -> Bool[Array, "batch T S"]:
    """Whether query and key belong to one segment. Padding (0) sees nothing and is seen by nothing."""
    query_BT1, key_B1S = query_segments_BT[:, :, None], key_segments_BS[:, None, :]
    return (query_BT1 == key_B1S) & (query_BT1 != 0)
