"""Parts of a plan in words, for the terminal and for the page alike."""

from collections.abc import Mapping
from typing import Any

GIB = 2**30


def gib(num_bytes: float) -> str:
    """GiB with two decimals, or four digits where there is little."""
    return f"{num_bytes / GIB:.4g}" if abs(num_bytes) < GIB / 10 else f"{num_bytes / GIB:,.2f}"


def mesh_text(sizes: Mapping[str, int]) -> str:
    """The axes of more than one device."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "1 device"


def remat_text(remat: Mapping[str, Any]) -> str:
    """A policy and what it saves."""
    return "+".join([remat["policy"], *remat.get("save", ())])


def moments_text(train: Mapping[str, Any]) -> str:
    """Where the moments are."""
    return "hosts" if train["moments_on_host"] else "devices"
