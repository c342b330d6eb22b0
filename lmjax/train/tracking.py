"""The rows of metrics.jsonl for other programs: event files of TensorBoard, and Weights & Biases."""

import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from lmjax.errors import InputError
from lmjax.paths import reaching
from lmjax.train.config import LoggingConfig, WandbConfig

Row = dict[str, Any]

FLUSH_SECONDS = 10.0
"""Between two writes of the event file to the disk."""


def scalars(row: Row) -> dict[str, float]:
    """What can be drawn of a row, by names such as ``train/loss``, ``evaluation/eval_loss``, ``mixture/code`` and
    ``router/3/entropy``; lists are left out."""
    kind = "evaluation" if "eval_loss" in row else "train"
    found = {}
    for key, value in row.items():
        if key not in ("step", "time"):
            found |= dict(_numbers(key if isinstance(value, dict) else f"{kind}/{key}", value))
    return found


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in ``value`` by their paths from ``name``."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _numbers(f"{name}/{key}", part)
    elif isinstance(value, int | float):
        yield name, float(value)


class TensorBoard:
    """The event file of a run, made anew from its rows at each start: no step is in it twice, and none is lost.

    An event holds all values of a row and has the row's step and time.
    """

    def __init__(self, directory: Path, rows: Iterable[Row]):
        """``rows`` are those that were written before; earlier event files in ``directory`` give way to them."""
        from tensorboardX import RecordWriter
        from tensorboardX.proto import event_pb2

        self._messages: Any = event_pb2
        directory.mkdir(exist_ok=True)
        remove_event_files(epath.Path(directory))
        now = time.time()
        file = directory / f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}"
        self._writer = RecordWriter(str(file))
        self._write(self._messages.Event(wall_time=now, file_version="brain.Event:2"))
        # A TensorBoard that is open forgets what it has read of the files that are gone.
        start = self._messages.SessionLog(status=self._messages.SessionLog.START)
        self._write(self._messages.Event(wall_time=now, step=0, session_log=start))
        self._flushed = time.monotonic()
        for row in rows:
            self.add(row)
        self.flush()

    def add(self, row: Row) -> None:
        when = row.get("time", time.time())  # rows of the first versions have none
        event = self._messages.Event(wall_time=when, step=row["step"])
        for name, value in scalars(row).items():
            event.summary.value.add(tag=name, simple_value=value)
        self._write(event)
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self, failed: bool) -> None:
        self._writer.flush()
        self._writer.close()

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())


def remove_event_files(directory: epath.Path) -> None:
    """Remove the event files of earlier starts, on a disk or in an object store."""
    with reaching(directory):
        for file in directory.glob("events.out.tfevents.*"):
            file.unlink()


class Wandb:
    """A run on Weights & Biases; one that is started again goes on under the same id.

    Steps that a resumed run repeats, with the same values, are kept as they were first sent.
    """

    def __init__(self, config: WandbConfig, run_dir: Path, identity: str, resolved: dict[str, Any]):
        """Raises InputError where the package is missing or the service refuses."""
        wandb = import_wandb()
        try:
            self._run = wandb.init(
                project=config.project,
                name=config.name or run_dir.resolve().name,
                entity=config.entity,
                mode=config.mode,
                id=identity,
                resume="allow",
                dir=str(run_dir),
                config=resolved,
                settings=wandb.Settings(silent=True, console="off"),  # or it would write into the progress bar
            )
        except wandb.Error as error:
            raise InputError(
                f"logging.wandb: {str(error).rstrip('.')}. Log in with `wandb login`, set logging.wandb.mode=offline, "
                "or leave logging.wandb out."
            ) from error

    def add(self, row: Row) -> None:
        self._run.log(scalars(row), step=row["step"])

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def check_trackers(config: LoggingConfig) -> None:
    """Raises InputError where a run asks for a package that is not installed."""
    if config.wandb is not None:
        import_wandb()


def import_wandb() -> Any:
    """The package. Raises InputError where it is not installed."""
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"logging.wandb needs the package wandb, which cannot be imported ({error}). Install the extra: "
            "pip install 'lmjax[wandb]', or leave logging.wandb out."
        ) from None
    return wandb
