"""A run as one HTML file that needs no other: curves, last values, samples and config."""

import base64
import html
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmjax.errors import InputError

Row = dict[str, Any]

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(24rem, 1fr)); gap: 1rem; }
.curves img { width: 100%; height: auto; } .curves img:first-child { grid-column: 1 / -1; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top; }
td { font-variant-numeric: tabular-nums; border-top: 1px solid #ddd; }
pre { background: #f6f6f4; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 14px; }
pre b { color: #06c; } .note { color: #666; }
"""


class Curve(NamedTuple):
    """One value of the rows of metrics.jsonl over the steps."""

    field: str
    title: str
    unit: str


RATES = (
    Curve("learning_rate", "Learning rate", ""),
    Curve("grad_norm", "Norm of the gradient, before clipping", ""),
    Curve("tokens_per_second", "Speed", "tokens/s"),
    Curve("mfu", "Model FLOPs utilisation", "of the peak"),
)
"""Pictures of their own below the losses; one whose values are all unknown is left out."""


class Records(NamedTuple):
    """What a run wrote down."""

    train: list[Row]
    evaluation: list[Row]
    samples: list[Row]
    config: str
    cut: list[str]
    """Files whose last line was not written to its end."""


def write_report(run_dir: str) -> Path:
    """Write ``report.html`` into ``run_dir`` and return its path; a run that is not finished may have one too.

    Raises InputError where there is no run, where it has no metrics yet, and for a line that cannot be read. A last
    line that a kill cut short is left out, and the report says so.
    """
    directory = Path(run_dir)
    path = directory / "report.html"
    text = render(directory.name, read_records(directory))
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_records(directory: Path) -> Records:
    """The files of a run. Raises as ``write_report`` does."""
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
        config=config.read_text(encoding="utf-8"),
        cut=cut,
    )


def render(name: str, records: Records) -> str:
    """The HTML of a report about the run ``name``."""
    title = html.escape(f"Run {name}")
    step = max(row["step"] for row in records.train + records.evaluation)
    notes = "".join(
        f'<p class="note">The last line of {html.escape(file)} was not written to its end and is left out.</p>\n'
        for file in records.cut
    )
    pictures = "\n".join(
        f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for alt, png in draw_curves(records)
    )
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>{STYLE}</style></head>
<body>
<h1>{title}</h1>
<p>After {step:,} updates.</p>
{notes}<div class="curves">
{pictures}
</div>
<h2>Last values</h2>
{_last_values(records)}
{_samples(records.samples)}<h2>Config</h2>
<pre>{html.escape(records.config)}</pre>
</body>
</html>
"""


def draw_curves(records: Records) -> list[tuple[str, bytes]]:
    """Each picture as a description and a PNG; the losses first."""
    pictures = [
        ("Training and evaluation loss over the updates", _picture((11, 4.5), lambda axes: _loss(axes, records)))
    ]
    for curve in RATES:
        if any(row.get(curve.field) is not None for row in records.train):
            picture = _picture((6, 3.2), lambda axes, curve=curve: _rate(axes, curve, records.train))
            pictures.append((f"{curve.title} over the updates", picture))
    return pictures


def _picture(size: tuple[float, float], draw) -> bytes:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.set_xlabel("finished updates")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    # No version or date in the file: the same run gives the same bytes.
    figure.savefig(file, format="png", dpi=130, metadata={"Software": None})
    return file.getvalue()


def _loss(axes: Axes, records: Records) -> None:
    axes.set_title("Loss")
    axes.set_ylabel("nats a token")
    if records.train:
        axes.plot(*_points(records.train, "loss"), color="#9db7d5", linewidth=1, label="training")
    if records.evaluation:
        style: dict[str, Any] = {"color": "#c0392b", "marker": "o", "markersize": 4}
        axes.plot(*_points(records.evaluation, "eval_loss"), label="evaluation", **style)
        unigram = records.evaluation[-1]["unigram_loss"]
        axes.axhline(unigram, color="#555", linestyle="--", linewidth=1, label=f"unigram loss, {unigram:.3f}")
    axes.legend(frameon=False)


def _rate(axes: Axes, curve: Curve, rows: Sequence[Row]) -> None:
    axes.set_title(curve.title)
    axes.set_ylabel(curve.unit)
    marker = "o" if len(rows) == 1 else None
    axes.plot(*_points(rows, curve.field), color="#2c5f8a", linewidth=1, marker=marker)
    axes.set_ylim(bottom=0)


def _points(rows: Sequence[Row], field: str) -> tuple[list[int], list[float]]:
    """Steps and values; a gap where a value is not known."""
    values = (row.get(field) for row in rows)
    return [row["step"] for row in rows], [math.nan if value is None else value for value in values]


def _last_values(records: Records) -> str:
    lines = ["<table>"]
    for title, rows in (("Training", records.train), ("Evaluation", records.evaluation)):
        if rows:
            lines.append(f"<tr><th>{title}</th><th></th></tr>")
            lines += [
                f"<tr><td>{html.escape(key)}</td><td>{_text(key, value)}</td></tr>" for key, value in rows[-1].items()
            ]
    return "\n".join([*lines, "</table>"])


def _text(key: str, value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, float) and not key.endswith("loss"):  # of losses every digit, to compare bits
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))


def _samples(rows: Sequence[Row]) -> str:
    """The samples of the last evaluation, and those before it folded away; nothing without samples."""
    steps = sorted({row["step"] for row in rows}, reverse=True)
    parts = []
    for step in steps:
        texts = "\n".join(
            f"<pre><b>{html.escape(row['prompt'])}</b>{html.escape(row['text'])}</pre>"
            for row in rows
            if row["step"] == step
        )
        if step == steps[0]:
            parts.append(f"<h2>Samples after {step:,} updates</h2>\n{texts}")
        else:
            parts.append(f"<details><summary>Samples after {step:,} updates</summary>\n{texts}</details>")
    return "".join(part + "\n" for part in parts)


def _read_rows(path: Path, cut: list[str]) -> list[Row]:
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
    for name in sorted(needed | {curve.field for curve in RATES}):
        value = row.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number and (value is not None or name in needed):
            return f"{name} is {value!r}, not a number"
    return None
