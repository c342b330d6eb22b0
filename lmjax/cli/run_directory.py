"""A run's directory: made once, and gone on with by the same experiment only."""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from lmjax.config import RunConfig, check_resume, dump, load
from lmjax.errors import InputError


@contextlib.contextmanager
def opened_run(config: RunConfig) -> Iterator[None]:
    """Make ``config.run_dir`` with the resolved config in it, or check that the run there is the same experiment's.

    The directory is locked while the context lasts: two trainings in it would remove each other's checkpoints. A run
    that was refused before it began, for its dataset say, has a config and nothing else: it may be any other. Raises
    InputError where it is not, where another process trains it, and where the directory is not a run's.
    """
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{run_dir}: another process trains this run now. Wait until it ends, or choose another run_dir."
            ) from None
        _check(config, run_dir)
        yield
    finally:
        os.close(lock)


def _check(config: RunConfig, run_dir: Path) -> None:
    recorded = run_dir / "config.yaml"
    if recorded.exists():
        if _has_begun(run_dir):
            before = dataclasses.replace(load(str(recorded)), run_dir=config.run_dir)  # it may have been moved
            check_resume(before, config, config.run_dir)
    elif any(run_dir.iterdir()):
        raise InputError(
            f"{run_dir}: the directory is not empty and has no config.yaml, so it is not a run. "
            "Choose another run_dir, or empty this one."
        )
    dump(config, str(recorded))


def _has_begun(run_dir: Path) -> bool:
    return any((run_dir / name).exists() for name in ("metrics.jsonl", "checkpoints"))


def to_job(config: RunConfig):
    """The same sections as the loop takes them."""
    from lmjax.config import to_tree
    from lmjax.train.job import Job

    sections = {name: getattr(config, name) for name in Job.__dataclass_fields__ if name != "resolved"}
    return Job(**sections, resolved=to_tree(config))
