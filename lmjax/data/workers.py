"""Running jobs in other processes, which start anew (no fork of threads) and never import JAX."""

import concurrent.futures
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Self, TypeVar

from lmjax.errors import InputError

Job = TypeVar("Job")
Result = TypeVar("Result")


class Workers:
    """Processes that start when they are first needed and end with the ``with`` block.

    ``num_workers`` None is one a CPU core. One worker is this process itself.
    """

    def __init__(self, num_workers: int | None):
        self._num_workers = num_workers or _cores()
        self._executor: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def run(self, function: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[tuple[int, Result]]:
        """(number, result) of every job as they finish. The first error of a job is raised, and the rest left undone.

        ``function`` and jobs are pickled. A single job is done in this process.
        """
        if self._num_workers == 1 or len(jobs) <= 1:
            yield from ((number, function(job)) for number, job in enumerate(jobs))
            return
        if self._executor is None:
            context = multiprocessing.get_context("spawn")
            self._executor = concurrent.futures.ProcessPoolExecutor(self._num_workers, context, _begin)
        waiting = iter(enumerate(jobs))
        running: dict[concurrent.futures.Future[Result], int] = {}
        try:
            while True:
                # A few more than there are workers, so that none waits, and no long queue of jobs is pickled.
                while len(running) < 2 * self._num_workers and (job := next(waiting, None)) is not None:
                    running[self._executor.submit(function, job[1])] = job[0]
                if not running:
                    return
                done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process ended in the middle of its work: it said why above, or was killed, perhaps for want "
                "of memory (then lower data.num_workers); run the same command again: it goes on"
            ) from error


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin() -> None:
    """Leave interrupts to the parent, and end when it ends, however it does: the pool itself would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
