"""What can go wrong in a run, and how it is noticed."""

import math
import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any, Self

from lmjax.errors import DivergedError


class StopSignal:
    """Notes SIGTERM and SIGINT instead of dying of them; a second one acts as it always does.

    Used as a context manager; outside the main thread, where Python takes no handlers, it never asks to stop.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


def check_finite(
    step: int,
    values: Mapping[str, float],
    last_saved: int | None,
    routers: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Raises DivergedError where one of the named values, or of a router's logits, is not finite.

    ``last_saved`` is the last checkpoint; ``routers`` are those of a row of metrics.jsonl.
    """
    broken = {number: round(told["not_finite"]) for number, told in (routers or {}).items() if told["not_finite"]}
    if all(map(math.isfinite, values.values())) and not broken:
        return
    told = " and ".join(f"{name} is {value!r}" for name, value in values.items())
    if broken:
        number, count = next(iter(broken.items()))
        told += f"; the router's logits are not finite for {count} tokens in block {number}"
        told += f" and for some in {len(broken) - 1} more blocks" if len(broken) > 1 else ""
    kept = "there is no checkpoint" if last_saved is None else f"the checkpoint of step {last_saved} is from before it"
    raise DivergedError(
        f"step {step}: {told}; the run is stopped and {kept}. "
        "Lower optimizer.learning_rate, lengthen optimizer.warmup_steps, or look at the batch of that step."
    )
