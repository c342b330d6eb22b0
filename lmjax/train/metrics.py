"""What a run writes down while it goes: metrics.jsonl, samples.jsonl, log.txt, and what the terminal shows."""

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lmjax.errors import PreemptedError
from lmjax.train.config import LoggingConfig
from lmjax.train.provenance import record_start
from lmjax.train.tracking import TensorBoard, Wandb

log = logging.getLogger("lmjax")

LINE_SECONDS = 10.0
"""Between two plain lines of progress."""


def keep_rows_until(path: Path, step: int) -> int:
    """Drop the rows after ``step`` of a file of JSON lines: the run is about to write them again.

    A last line that a kill cut short is dropped too. Returns the last step of the dropped rows; -1 if there are none.
    """
    if not path.exists():
        return -1
    kept, dropped = [], -1
    for line in path.read_bytes().splitlines(keepends=True):  # of text, U+2028 within a sample would end a line too
        if not line.endswith(b"\n"):
            break
        found = json.loads(line)["step"]
        if found <= step:
            kept.append(line)
        else:
            dropped = max(dropped, found)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, path)
    return dropped


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of whole JSON lines; none where there is no file."""
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                yield json.loads(line)


def last_step(path: Path) -> int:
    """The last step of a file of JSON lines, of which a kill may have cut the last one; -1 where it has no line."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=-1)


class ConsoleWarnings(logging.Handler):
    """Shows warnings of the run's parts on the terminal, above the bar."""

    def __init__(self, console: Console):
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


class Recorder:
    """Writes a run's files. Every process has one; those that are not ``primary`` write and show nothing.

    Used as a context manager, it is closed at the end.
    """

    def __init__(self, run_dir: Path, config: LoggingConfig, *, start: int, steps: int, primary: bool):
        """``start`` finished updates of ``steps``; rows of later ones are dropped from the files."""
        self.evaluations: list[tuple[int, float]] = []
        """Step and loss of the evaluations that were written so far, in their order."""
        self.last_evaluated = -1
        """The last step with an evaluation or a sample."""
        self.dropped = -1
        """The last step of the rows of metrics.jsonl that were dropped; -1 if there were none."""
        self._run_dir, self._config, self._primary, self._start = run_dir, config, primary, start
        self._bar = None
        self._trackers: list[TensorBoard | Wandb] = []
        if not primary:
            return
        kept = start or -1  # from the beginning, step 0 is evaluated again
        self.dropped = keep_rows_until(run_dir / "metrics.jsonl", kept)
        keep_rows_until(run_dir / "samples.jsonl", kept)
        self._note_evaluations()
        self._metrics = (run_dir / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self._samples = (run_dir / "samples.jsonl").open("a", encoding="utf-8", buffering=1)
        self._handler = logging.FileHandler(run_dir / "log.txt", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._console = Console()
        self._handlers = (self._handler, ConsoleWarnings(self._console))
        for handler in self._handlers:
            log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False  # a library that sets up the root logger would print every line twice
        self._last_line = -math.inf
        bar = config.progress == "bar" or (config.progress == "auto" and self._console.is_terminal)
        if bar:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("training", total=steps, completed=start)
            self._bar.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self.close(failed=kind is not None and not issubclass(kind, PreemptedError))

    def begin(self, dataset: str, resolved: dict[str, Any]) -> None:
        """Record this start in run.json, and open what shows the metrics elsewhere.

        ``dataset`` is its fingerprint, ``resolved`` the whole config.

        Raises InputError where one of them refuses.
        """
        if self._primary:
            identity = record_start(self._run_dir, self._start, dataset)
            rows = read_rows(self._run_dir / "metrics.jsonl")
            self._trackers.append(TensorBoard(self._run_dir / "tensorboard", rows))
            if self._config.wandb is not None:
                self._trackers.append(Wandb(self._config.wandb, self._run_dir, identity, resolved))

    def message(self, text: str) -> None:
        """One line for people, on the terminal and in log.txt."""
        if self._primary:
            log.info(text)
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def train_row(self, row: dict[str, Any], *, last: bool) -> None:
        if not self._primary:
            return
        self._write(row)
        text = progress_text(row)
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], description=text)
        elif last or time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(f"step {row['step']}  {text}", markup=False, highlight=False, soft_wrap=True)

    def evaluation_row(self, row: dict[str, Any]) -> None:
        if self._primary:
            self._write(row)
        self.message(
            f"step {row['step']}: evaluation loss {row['eval_loss']:.4f}, perplexity {row['perplexity']:.2f} "
            f"(unigram loss {row['unigram_loss']:.4f})"
        )

    def sample_rows(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            if self._primary:
                self._samples.write(json.dumps(row, ensure_ascii=False) + "\n")

    def close(self, failed: bool = False) -> None:
        if not self._primary:
            return
        if self._bar is not None:
            self._bar.stop()
        for tracker in self._trackers:
            tracker.close(failed)
        for handler in self._handlers:
            log.removeHandler(handler)
        log.propagate = True
        for file in (self._metrics, self._samples, self._handler):
            file.close()

    def _write(self, row: dict[str, Any]) -> None:
        row = row | {"time": round(time.time(), 3)}
        self._metrics.write(json.dumps(row) + "\n")
        for tracker in self._trackers:
            tracker.add(row)

    def _note_evaluations(self) -> None:
        for row in read_rows(self._run_dir / "metrics.jsonl"):
            if "eval_loss" in row:
                self.evaluations.append((row["step"], row["eval_loss"]))
                self.last_evaluated = row["step"]
        self.last_evaluated = max(self.last_evaluated, last_step(self._run_dir / "samples.jsonl"))


def progress_text(row: dict[str, Any]) -> str:
    """A row of training in one line; what is not known is left out."""
    parts = [f"loss {row['loss']:.4f}", f"{row['tokens_per_second']:,.0f} tokens/s"]
    if row["mfu"] is not None:
        parts.append(f"MFU {row['mfu']:.1%}")
    if row["memory_bytes"] is not None:
        parts.append(f"{row['memory_bytes'] / 2**30:.1f} GiB")
    return "  ".join([*parts, f"waited {row['data_wait_share']:.1%} for data"])
