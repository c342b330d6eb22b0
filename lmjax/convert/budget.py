"""How much memory a conversion takes, in advance."""

from typing import NamedTuple

from lmjax.errors import InputError

DEFAULT_BUDGET = 4_000_000_000
"""Bytes."""
BASE_BYTES = 450_000_000
"""What Python and the libraries take before a tensor is touched."""
MAX_AT_ONCE = 4


class Need(NamedTuple):
    """What one slice takes while it is on its way."""

    what: str
    num_bytes: int
    copies: int

    @property
    def total(self) -> int:
        return self.num_bytes * self.copies


def at_once(budget: int, need: Need, beside: int = 0) -> int:
    """How many slices may be on their way together, MAX_AT_ONCE at most.

    ``beside`` bytes are held for each besides. Raises InputError, with the arithmetic, where there is no room for one.
    """
    least = BASE_BYTES + beside + need.total
    if budget < least:
        others = f" and {_gigabytes(beside)} beside it" if beside else ""
        raise InputError(
            f"--memory-budget: {_gigabytes(budget)} is too little: lmjax and its libraries take "
            f"{_gigabytes(BASE_BYTES)}, {need.what} of {_gigabytes(need.num_bytes)} is in memory {need.copies} times"
            f"{others}; give at least {_gigabytes(least)}"
        )
    return min(MAX_AT_ONCE, (budget - BASE_BYTES) // max(1, need.total + beside))


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
