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

    def visible(self, distance: Int[Array, "*batch T S"]) -> Bool[Array, "*batch T S"]:
        """Whether a query sees a key, given the positions from key to query."""
        visible = distance >= 0 if self.causal else jnp.ones(distance.shape, bool)
        return visible if self.window is None else visible & (distance < self.window)


def visible_pairs(
    mask: Mask,
    distance_TS: Int[Array, "T S"],
    query_segments_BT: Int[Array, "batch T"] | None,
    key_segments_BS: Int[Array, "batch S"] | None,
    key_prefix_BS: Bool[Array, "batch S"] | None,
) -> Bool[Array, "*batch T S"]:
    """All that decides whether a query sees a key; (T, S) where nothing depends on the row.

    Keys of the prefix are seen by every query of their segment (a prefix-LM mask, arXiv 1910.10683 section 3.2.1).
    """
    visible = mask.visible(distance_TS)
    if key_prefix_BS is not None:
        visible = visible | key_prefix_BS[:, None, :]
    if query_segments_BT is not None:
        assert key_segments_BS is not None
        visible = visible & same_segment(query_segments_BT, key_segments_BS)
    return visible


def same_segment(
    query_segments_BT: Int[Array, "batch T"], key_segments_BS: Int[Array, "batch S"]
) -> Bool[Array, "batch T S"]:
    """Whether query and key belong to one segment. Padding (0) sees nothing and is seen by nothing."""
    query_BT1, key_B1S = query_segments_BT[:, :, None], key_segments_BS[:, None, :]
    return (query_BT1 == key_B1S) & (query_BT1 != 0)
