"""A run's directory: made once, and gone on with by the same experiment only."""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from lmjax.config import RunConfig, check_resume, dump, load
from lmjax.errors import InputError
from lmjax.paths import Mirror, as_path, reaching

RUN_FILES = ("config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "log.txt")
"""What a run goes on with; the rest is made anew from these and the checkpoints."""


@contextlib.contextmanager
def opened_run(config: RunConfig) -> Iterator[Mirror]:
    """Make ``config.run_dir`` with the resolved config in it, or check that the run there is the same experiment's.

    The directory is locked while the context lasts: two trainings in it would remove each other's checkpoints. A run
    that was refused before it began, for its dataset say, has a config and nothing else: it may be any other. Raises
    InputError where it is not, where another process trains it, and where the directory is not a run's.

    The files of a run in an object store are written in ``working_directory`` and copied to the store at the end; in
    between, the ``push`` of what this gives copies them. There the lock is of this machine alone, since a store has
    none: nothing keeps two machines out of one run.
    """
    mirror = Mirror(config.run_dir)
    mirror.local.mkdir(parents=True, exist_ok=True)
    lock = os.open(mirror.local, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{config.run_dir}: another process trains this run now. Wait until it ends, or choose another run_dir."
            ) from None
        mirror.pull(RUN_FILES)
        _check(config, mirror.local)
        mirror.push()
        try:
            yield mirror
        finally:
            mirror.push()
    finally:
        os.close(lock)


def _check(config: RunConfig, files: Path) -> None:
    """Check, and record, the config of the run whose files are in ``files`` on this machine."""
    recorded, run_dir = files / "config.yaml", as_path(config.run_dir)
    if recorded.exists():
        with reaching(run_dir):
            has_begun = (files / "metrics.jsonl").exists() or (run_dir / "checkpoints").exists()
        if has_begun:
            before = dataclasses.replace(load(str(recorded)), run_dir=config.run_dir)  # it may have been moved
            check_resume(before, config, config.run_dir)
    else:
        with reaching(run_dir):
            is_empty = not run_dir.exists() or not any(run_dir.iterdir())
        if not is_empty:
            raise InputError(
                f"{run_dir}: the directory is not empty and has no config.yaml, so it is not a run. "
                "Choose another run_dir, or empty this one."
            )
    dump(config, str(recorded))


def to_job(config: RunConfig):
    """The same sections as the loop takes them."""
    from lmjax.config import to_tree
    from lmjax.train.job import Job

    sections = {name: getattr(config, name) for name in Job.__dataclass_fields__ if name != "resolved"}
    return Job(**sections, resolved=to_tree(config))
