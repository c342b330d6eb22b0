"""Running jobs in this process and in others, which start anew (no fork of threads) and never import JAX."""

import concurrent.futures
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Self, TypeVar

from lmjax.errors import InputError

Job = TypeVar("Job")
Result = TypeVar("Result")


class Workers:
    """This process and others, which start when they are first needed and end with the ``with`` block.

    ``num_workers`` counts all of them; None is one a CPU core. This process works too, in a thread: it begins at once,
    while the others still import what they need.
    """

    def __init__(self, num_workers: int | None):
        self._num_workers = num_workers or _cores()
        self._depths: dict[concurrent.futures.Executor, int] = {}
        """The executors, once they are needed, and how many jobs each is given ahead."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for executor in self._depths:
            executor.shutdown(cancel_futures=True)

    def run(self, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[tuple[int, Result]]:
        """(number, result) of every job as they finish. The first error of a job is raised, and the rest left undone.

        ``function`` and jobs are pickled. A job is taken when a worker is about to need it; a single one is done in the
        calling thread.
        """
        waiting = enumerate(jobs)
        begin = list(itertools.islice(waiting, 2))
        waiting = itertools.chain(begin, waiting)
        if self._num_workers == 1 or len(begin) < 2:
            yield from ((number, function(job)) for number, job in waiting)
            return
        if not self._depths:
            context = multiprocessing.get_context("spawn")
            others = concurrent.futures.ProcessPoolExecutor(self._num_workers - 1, context, _begin)
            # A few more than there are processes, so that none waits, and no long queue of jobs is pickled.
            self._depths = {concurrent.futures.ThreadPoolExecutor(1): 1, others: 2 * (self._num_workers - 1)}
        running: dict[concurrent.futures.Future[Result], int] = {}
        given: dict[concurrent.futures.Future[Result], concurrent.futures.Executor] = {}
        try:
            while True:
                for executor, depth in self._depths.items():
                    while list(given.values()).count(executor) < depth and (job := next(waiting, None)) is not None:
                        future = executor.submit(function, job[1])
                        running[future], given[future] = job[0], executor
                if not running:
                    return
                done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    del given[future]
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
