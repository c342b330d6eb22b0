"""A run's directory: made once, and gone on with by the same experiment only."""

from pathlib import Path

from lmjax.config import RunConfig, check_resume, dump, load
from lmjax.errors import InputError


def open_run(config: RunConfig) -> None:
    """Make ``config.run_dir`` with the resolved config in it, or check that the run there is the same experiment's.

    Raises InputError where it is not, and where the directory holds something that is not a run.
    """
    run_dir = Path(config.run_dir)
    recorded = run_dir / "config.yaml"
    if recorded.exists():
        check_resume(load(str(recorded)), config, config.run_dir)
    elif run_dir.is_dir() and any(run_dir.iterdir()):
        raise InputError(
            f"{run_dir}: the directory is not empty and has no config.yaml, so it is not a run. "
            "Choose another run_dir, or empty this one."
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    dump(config, str(recorded))


def to_job(config: RunConfig):
    """The same sections as the loop takes them."""
    from lmjax.config import to_tree
    from lmjax.train.job import Job

    sections = {name: getattr(config, name) for name in Job.__dataclass_fields__ if name != "resolved"}
    return Job(**sections, resolved=to_tree(config))
