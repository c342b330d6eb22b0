"""Which intermediate values the backward pass finds saved: a table from a name to a ``jax.checkpoint`` policy."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax

from lmjax.nn.tags import Tag
from lmjax.schema import config_class

F = TypeVar("F", bound=Callable[..., Any])

_policies = jax.checkpoint_policies


@config_class
class RematConfig:
    """What each block of the decoder keeps for the backward pass; the rest is computed again."""

    policy: Literal["none", "full", "dots", "attention", "save"] = "full"
    """``none`` keeps everything, ``full`` only the block's input, ``dots`` the results of matrix products with weights,
    ``attention`` the attention's result, ``save`` what ``save`` and ``offload`` name."""
    save: tuple[Tag, ...] = ()
    """Values to keep on the device (policy save only)."""
    offload: tuple[Tag, ...] = ()
    """Values to keep in the host's memory (policy save only)."""

    def __post_init__(self) -> None:
        named = self.save + self.offload
        if self.policy == "save" and not named:
            raise ValueError("remat policy save keeps what remat.save and remat.offload name, and both are empty")
        if self.policy != "save" and named:
            raise ValueError(f"remat.save and remat.offload have an effect with policy save only, not {self.policy}")
        if len(set(named)) != len(named):
            raise ValueError(f"a value is named twice in remat.save and remat.offload: {list(named)}")


def checkpointed(function: F, remat: RematConfig, *, is_alone: bool) -> F:
    """``function`` under ``jax.checkpoint`` as ``remat`` says; ``is_alone`` if it is all that the body of a scan calls.

    Elsewhere the compiler sees that what is computed again was computed before, and would keep it after all; and in a
    body that calls it several times, that what is computed again waits for no gradient, and would compute it for all
    calls at once. Barriers keep it from both.
    """
    match remat.policy:
        case "none":
            return function
        case "full":
            policy = _policies.nothing_saveable
        case "dots":
            policy = _policies.save_only_these_names("projection")
        case "attention":
            policy = _policies.save_only_these_names("attention_out")
        case "save":
            policy = _policies.save_and_offload_only_these_names(
                names_which_can_be_saved=list(remat.save),
                names_which_can_be_offloaded=list(remat.offload),
                offload_src="device",
                offload_dst="pinned_host",
            )
    return jax.checkpoint(function, policy=policy, prevent_cse=not is_alone)  # pyright: ignore[reportReturnType]
