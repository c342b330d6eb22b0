"""What a run wrote down, read back; see ``lmjax.train.metrics``."""

import json
from typing import Any, NamedTuple

from etils import epath

from lmjax.errors import InputError
from lmjax.train import provenance

Row = dict[str, Any]

RATES = ("learning_rate", "grad_norm", "tokens_per_second", "mfu", "data_wait_share")
"""Numbers of a row of training that are drawn; some are null where they are not known."""


class Records(NamedTuple):
    """The files of a run."""

    train: list[Row]
    evaluation: list[Row]
    samples: list[Row]
    starts: list[Row]
    """What each start of the run was made with; none for a run of the first versions."""
    config: str
    cut: list[str]
    """Files whose last line was not written to its end."""


def read_records(directory: epath.Path) -> Records:
    """Raises InputError where there is no run, where it has no metrics yet, and for a line that cannot be read.

    A last line that a kill cut short is left out.
    """
    if not directory.is_dir():
        raise InputError(f"{directory}: no such run. Give the directory of a run, such as runs/quickstart.")
    config = directory / "config.yaml"
    if not config.exists():
        raise InputError(f"{directory}: not a run, it has no config.yaml. Give the run_dir of `lmjax train`.")
    cut: list[str] = []
    metrics = _read_rows(directory / "metrics.jsonl", cut)
    if not metrics:
        raise InputError(f"{directory}: no metrics yet in metrics.jsonl. Train the run first: `lmjax train`.")
    return Records(
        train=[row for row in metrics if "loss" in row],
        evaluation=[row for row in metrics if "eval_loss" in row],
        samples=_read_rows(directory / "samples.jsonl", cut),
        starts=(provenance.read(directory) or {"starts": []})["starts"],
        config=config.read_text(encoding="utf-8"),
        cut=cut,
    )


def _read_rows(path: epath.Path, cut: list[str]) -> list[Row]:
    """The objects of a file of JSON lines, none if it is not there; ``cut`` gets its name if the last one is cut."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            if number == len(lines) and not line.endswith(b"\n"):
                cut.append(path.name)
                break
            raise InputError(
                f"{path}, line {number}: not JSON ({error}). Remove the line, or train the run anew."
            ) from error
        if problem := _problem(path.name, row):
            raise InputError(f"{path}, line {number}: {problem}. Remove the line, or train the run anew.")
        rows.append(row)
    return rows


def _problem(file: str, row: Any) -> str | None:
    """What keeps ``row`` from being one that a run writes into ``file``."""
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return "not an object with a step"
    if file == "samples.jsonl":
        texts = [row.get(name) for name in ("prompt", "text")]
        return None if all(isinstance(text, str) for text in texts) else "a sample without prompt and text"
    if ("loss" in row) == ("eval_loss" in row):
        return "neither a row of training (loss) nor one of evaluation (eval_loss)"
    needed = {"loss"} if "loss" in row else {"eval_loss", "unigram_loss"}
    for name in sorted(needed | set(RATES)):
        value = row.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number and (value is not None or name in needed):
            return f"{name} is {value!r}, not a number"
    return None
