"""What a run writes down while it goes: metrics.jsonl, samples.jsonl, log.txt, and what the terminal shows."""

import json
import logging
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lmjax.train.config import LoggingConfig

log = logging.getLogger("lmjax")

PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
}
"""Dense bfloat16 operations per second of one device, by the start of its ``device_kind`` (vendors' data sheets)."""

LINE_SECONDS = 10.0
"""Between two plain lines of progress."""


def peak_flops(device_kind: str) -> float | None:
    """None for a device that is not in the table: its MFU is not known."""
    names = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def keep_rows_until(path: Path, step: int) -> None:
    """Drop the rows after ``step`` of a file of JSON lines: the run is about to write them again.

    A last line that a kill cut short is dropped too.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):  # of text, U+2028 within a sample would end a line too
        if not line.endswith(b"\n"):
            break
        if json.loads(line)["step"] <= step:
            kept.append(line)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, path)


class ConsoleWarnings(logging.Handler):
    """Shows warnings of the run's parts on the terminal, above the bar."""

    def __init__(self, console: Console):
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


class Recorder:
    """Writes a run's files. Every process has one; those that are not ``primary`` write and show nothing."""

    def __init__(self, run_dir: Path, config: LoggingConfig, *, start: int, steps: int, primary: bool):
        """``start`` finished updates of ``steps``; rows of later ones are dropped from the files."""
        self._primary = primary
        self._bar = None
        if not primary:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            keep_rows_until(run_dir / name, start or -1)  # from the beginning, step 0 is evaluated again
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

    def message(self, text: str) -> None:
        """One line for people, on the terminal and in log.txt."""
        if self._primary:
            log.info(text)
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def train_row(self, row: dict[str, Any], *, last: bool) -> None:
        if not self._primary:
            return
        self._metrics.write(json.dumps(row) + "\n")
        mfu = "" if row["mfu"] is None else f"  MFU {row['mfu']:.1%}"
        text = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s{mfu}"
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], description=text)
        elif last or time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(f"step {row['step']}  {text}", markup=False, highlight=False, soft_wrap=True)

    def evaluation_row(self, row: dict[str, Any]) -> None:
        if self._primary:
            self._metrics.write(json.dumps(row) + "\n")
        self.message(
            f"step {row['step']}: evaluation loss {row['eval_loss']:.4f}, perplexity {row['perplexity']:.2f} "
            f"(unigram loss {row['unigram_loss']:.4f})"
        )

    def sample_rows(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            if self._primary:
                self._samples.write(json.dumps(row, ensure_ascii=False) + "\n")

    def close(self) -> None:
        if not self._primary:
            return
        if self._bar is not None:
            self._bar.stop()
        for handler in self._handlers:
            log.removeHandler(handler)
        log.propagate = True
        for file in (self._metrics, self._samples, self._handler):
            file.close()
