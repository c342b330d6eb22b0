"""A profiler trace of chosen updates."""

from pathlib import Path

import jax


class Profiler:
    """Writes a trace of the updates ``steps`` (the first and the last) into ``directory``; with None it does nothing.

    ``before`` and ``after`` are called for every update: when it is about to be dispatched, and when it is known to be
    finished. The devices are not waited for, so that the trace may begin with the end of the update before and may hold
    the beginning of the one after.
    """

    def __init__(self, directory: Path, steps: tuple[int, int] | None):
        self._directory, self._steps = directory, steps
        self._active = False

    def before(self, step: int) -> None:
        if self._steps is not None and not self._active and self._steps[0] <= step <= self._steps[1]:
            self._active = True
            jax.profiler.start_trace(str(self._directory))

    def after(self, step: int) -> bool:
        """Whether this was the last update of the trace, which is then written."""
        ended = self._active and self._steps is not None and step >= self._steps[1]
        if ended:
            self.close()
        return ended

    def close(self) -> None:
        """Write what there is of a trace that is under way."""
        if self._active:
            self._active = False
            self._steps = None
            jax.profiler.stop_trace()
