"""Workers: every job is done once, by this process and others where there are several, and errors come back."""

import multiprocessing
import os
import sys
import time
from pathlib import Path

import pytest

from lmjax.data.workers import Workers
from lmjax.errors import InputError


def describe(job: int) -> tuple[int, int, bool]:
    return job, os.getpid(), "jax" in sys.modules


def refuse(job: int) -> int:
    if job == 2:
        raise InputError("job 2 is refused")
    return job


def die(parent: int) -> int:
    """The end of a worker; the process with this number goes on."""
    if os.getpid() != parent:
        os._exit(1)
    time.sleep(0.01)
    return parent


def meet(folder: Path) -> tuple[int, bool]:
    """Wait until two processes are at work; the number of this one."""
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + 120
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    return os.getpid(), "jax" in sys.modules


@pytest.mark.fast
def test_one_worker_is_this_process_and_keeps_the_order():
    with Workers(1) as workers:
        assert list(workers.run(describe, [5, 6])) == [(0, (5, os.getpid(), True)), (1, (6, os.getpid(), True))]
        assert list(workers.run(describe, [])) == []
        with pytest.raises(InputError, match="job 2"):
            list(workers.run(refuse, [1, 2, 3]))


def test_several_workers_are_this_process_and_others_without_jax(tmp_path):
    with Workers(2) as workers:
        found = dict(workers.run(meet, [tmp_path] * 6))
        assert sorted(found) == list(range(6))
        of_others = {process: has_jax for process, has_jax in found.values() if process != os.getpid()}
        assert list(of_others.values()) == [False]
        assert os.getpid() in {process for process, _ in found.values()}
        assert {number: job for number, (job, *_) in workers.run(describe, range(10, 20))} == {
            number: number + 10 for number in range(10)
        }
        assert {process for _, (process, _) in workers.run(meet, [tmp_path] * 6)} <= {*of_others, os.getpid()}, "kept"
        with pytest.raises(InputError, match="job 2"):
            list(workers.run(refuse, [1, 2, 3]))
        with pytest.raises(InputError, match="a worker process ended in the middle"):
            list(workers.run(die, [os.getpid()] * 10_000))
    assert not multiprocessing.active_children()
