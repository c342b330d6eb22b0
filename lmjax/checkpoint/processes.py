"""Agreement between the processes of a run, over the key-value store of ``jax.distributed``.

No device takes part, so that nothing is compiled and a mesh in use is not disturbed. Each function is collective: every
process calls it, from its main thread, in the same order. With one process they return at once. An agreement costs two
round trips to process 0 (under a millisecond on one machine).
"""

import contextlib
import itertools
import json
import platform
import typing
from collections.abc import Iterator

import jax

from lmjax.compat import coordination_client
from lmjax.errors import InputError

TIMEOUT_MS = 30 * 60 * 1000  # verifying a large checkpoint takes minutes, and the others wait for it here

_calls = itertools.count()


def decide(flag: bool) -> bool:
    """Whether any process says yes: all processes get the same answer."""
    return bool(_exchange("1" if flag else None)) if jax.process_count() > 1 else flag


def share(value: typing.Any) -> typing.Any:
    """What process 0 gave, on every process. JSON values only; other processes may give anything."""
    return gather(value if jax.process_index() == 0 else None)[0]


@contextlib.contextmanager
def refused_by_all(advice: str) -> Iterator[None]:
    """Run the block, and raise the InputError of the first process that has one on every process.

    Without this the others would wait for a process that has given up. An error of the operating system becomes an
    InputError that ends with ``advice``.
    """
    failure = None
    try:
        yield
    except InputError as error:
        failure = str(error)
    except OSError as error:
        failure = f"{error.filename or 'the disk'}: {error.strerror}; {advice}"
    if failures := [found for found in gather(failure) if found]:
        raise InputError(failures[0])


def first_on_machine() -> bool:
    """Whether this process is the one with the lowest number on its machine: what is done once a disk is its to do."""
    machines = gather(platform.node())
    return machines.index(machines[jax.process_index()]) == jax.process_index()


def gather(value: typing.Any) -> list[typing.Any]:
    """What every process gave, by process number. JSON values only."""
    text = json.dumps(value)
    said = _exchange(text) if jax.process_count() > 1 else {0: text}
    return [json.loads(said[process]) for process in range(jax.process_count())]


def _exchange(text: str | None) -> dict[int, str]:
    """What the processes that gave a text gave."""
    client = coordination_client()
    assert client is not None, "several processes without jax.distributed"
    call, process = next(_calls), jax.process_index()
    if text is not None:
        client.key_value_set(f"lmjax/{call}/{process}", text)
    client.wait_at_barrier("lmjax", TIMEOUT_MS)
    said = {int(key.rsplit("/", 1)[1]): value for key, value in client.key_value_dir_get(f"lmjax/{call}/")}
    if call and process == 0:
        client.key_value_delete(f"lmjax/{call - 1}/")  # every process read it before it came to this barrier
    return said
