"""Workers: every job is done once, by other processes where there are several, and errors come back."""

import multiprocessing
import os
import sys

import pytest

from lmjax.data.workers import Workers
from lmjax.errors import InputError


def describe(job: int) -> tuple[int, int, bool]:
    return job, os.getpid(), "jax" in sys.modules


def refuse(job: int) -> int:
    if job == 2:
        raise InputError("job 2 is refused")
    return job


def die(job: int) -> int:
    os._exit(1)


@pytest.mark.fast
def test_one_worker_is_this_process_and_keeps_the_order():
    with Workers(1) as workers:
        assert list(workers.run(describe, [5, 6])) == [(0, (5, os.getpid(), True)), (1, (6, os.getpid(), True))]
        assert list(workers.run(describe, [])) == []
        with pytest.raises(InputError, match="job 2"):
            list(workers.run(refuse, [1, 2, 3]))


def test_several_workers_do_every_job_once_without_jax_and_give_errors_back():
    with Workers(2) as workers:
        found = dict(workers.run(describe, list(range(10, 20))))
        assert {number: job for number, (job, _, _) in found.items()} == {n: n + 10 for n in range(10)}
        processes = {process for _, process, _ in found.values()}
        assert os.getpid() not in processes
        assert len(processes) <= 2
        assert dict(workers.run(describe, [1, 2]))[0][1] in processes, "the processes are kept"
        with pytest.raises(InputError, match="job 2"):
            list(workers.run(refuse, [1, 2, 3]))
        with pytest.raises(InputError, match="a worker process ended in the middle"):
            list(workers.run(die, [1, 2, 3]))
    assert not multiprocessing.active_children()
