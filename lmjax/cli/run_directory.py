"""A run's directory: made once, and gone on with by the same experiment only."""

import dataclasses
from pathlib import Path

from lmjax.config import RunConfig, check_resume, dump, load
from lmjax.errors import InputError


def open_run(config: RunConfig) -> None:
    """Make ``config.run_dir`` with the resolved config in it, or check that the run there is the same experiment's.

    A run that was refused before it began, for its dataset say, has a config and nothing else: it may be any other.
    Raises InputError where it is not, and where the directory holds something that is not a run.
    """
    run_dir = Path(config.run_dir)
    recorded = run_dir / "config.yaml"
    if recorded.exists():
        if _has_begun(run_dir):
            before = dataclasses.replace(load(str(recorded)), run_dir=config.run_dir)  # it may have been moved
            check_resume(before, config, config.run_dir)
    elif run_dir.is_dir() and any(run_dir.iterdir()):
        raise InputError(
            f"{run_dir}: the directory is not empty and has no config.yaml, so it is not a run. "
            "Choose another run_dir, or empty this one."
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    dump(config, str(recorded))


def _has_begun(run_dir: Path) -> bool:
    return any((run_dir / name).exists() for name in ("metrics.jsonl", "checkpoints"))


def to_job(config: RunConfig):
    """The same sections as the loop takes them."""
    from lmjax.config import to_tree
    from lmjax.train.job import Job

    sections = {name: getattr(config, name) for name in Job.__dataclass_fields__ if name != "resolved"}
    return Job(**sections, resolved=to_tree(config))
