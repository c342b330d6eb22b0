"""What may differ between a run and the config that it is resumed with."""

import dataclasses
from typing import Any, NamedTuple

from lmjax.errors import InputError

MAY_CHANGE = (
    "mesh",
    "train.steps",
    "train.remat",
    "train.moments_on_host",
    "train.attention_kernel",
    "train.expert_exchange",
    "train.xla_flags",
    "logging",
    "checkpoint",
    "evaluate",
    "data.path",
    "data.num_workers",
)
"""What changes no batch, and of an update the last bits at most: another mesh may need other kernels and less memory. A
dataset that was moved is known by its fingerprint."""


class Difference(NamedTuple):
    """A key whose values are not equal; a list is one value."""

    key: str
    before: Any
    after: Any


def differences(before: Any, after: Any, key: str = "") -> list[Difference]:
    """Where two objects of config classes differ, by full key."""
    if type(before) is not type(after) or not dataclasses.is_dataclass(before):
        return [] if before == after else [Difference(key, before, after)]
    found = []
    for field in dataclasses.fields(before):
        inner = f"{key}.{field.name}" if key else field.name
        found += differences(getattr(before, field.name), getattr(after, field.name), inner)
    return found


def check_resume(before: Any, after: Any, run_dir: str) -> None:
    """Raise InputError if ``after`` would not go on with the run in ``run_dir``, which was made with ``before``."""
    refused = [found for found in differences(before, after) if not _may_change(found.key)]
    if refused:
        lines = [f"  {found.key}: the run has {found.before!r}, the config {found.after!r}" for found in refused]
        raise InputError(
            f"{run_dir} was made with another config:\n"
            + "\n".join(lines)
            + "\nGive these their values of the run, or "
            f"choose another run_dir. On resume may change: {', '.join(MAY_CHANGE)}"
        )


def _may_change(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in MAY_CHANGE)
