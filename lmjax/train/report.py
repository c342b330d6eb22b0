"""Runs as one HTML file that needs no other: curves, last values, samples, configs and what they were made with."""

import datetime
import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from omegaconf import OmegaConf

from lmjax.errors import InputError
from lmjax.paths import as_path, is_remote
from lmjax.train.curves import draw_curves
from lmjax.train.page import images, page, table, write_page
from lmjax.train.records import Records, Row, read_records

COMPARED = ("tokens", "loss", "tokens_per_second", "mfu", "memory_bytes", "data_wait_share")
"""Of the last row of training, where several runs stand side by side."""


def write_report(run_dirs: Sequence[str], output: str | None = None) -> epath.Path:
    """Write the report of one run or the comparison of several, and return its path; unfinished runs may be among them.

    Without ``output``, one run has it as ``report.html`` in its directory, several as ``comparison.html`` in the
    current one. Raises InputError as ``read_records`` does, and for a run that is named twice.
    """
    directories = [as_path(run_dir) for run_dir in run_dirs]
    if len({_whole(directory) for directory in directories}) < len(directories):
        raise InputError(f"{', '.join(run_dirs)}: a run is named twice. Name each one once.")
    runs = dict(zip(_names(directories), map(read_records, directories), strict=True))
    several = len(runs) > 1
    path = as_path(output or "comparison.html") if output or several else directories[0] / "report.html"
    text = compare(runs) if several else render(*next(iter(runs.items())))
    write_page(path, text, "--output")
    return path


def render(name: str, records: Records) -> str:
    """The HTML of a report about the run ``name``."""
    step = max(row["step"] for row in records.train + records.evaluation)
    parts = [
        f"<p>After {step:,} updates.</p>",
        *_notes(records),
        images(draw_curves({name: records})),
        f"<h2>Last values</h2>\n{_last_values(records)}",
        *_samples(records.samples),
        *_starts(records.starts),
        f"<h2>Config</h2>\n<pre>{html.escape(records.config)}</pre>",
    ]
    return page(f"Run {name}", parts)


def compare(runs: Mapping[str, Records]) -> str:
    """The HTML of a page that has several runs, by name, in the same pictures and tables."""
    parts = [
        *(f'<p class="note">{html.escape(name)}:</p>{note}' for name, run in runs.items() for note in _notes(run)),
        images(draw_curves(runs)),
        f"<h2>Last values</h2>\n{_side_by_side(runs)}",
        f"<h2>Where the configs differ</h2>\n{_differences(runs)}",
    ]
    for name, records in runs.items():
        parts += _starts(records.starts, f"{name}: ")
    return page(f"Runs {', '.join(runs)}", parts)


def _whole(directory: epath.Path) -> str:
    """The whole path of a run, so that runs/first and . are the same where they are."""
    return str(directory) if is_remote(directory) else str(directory.resolve())


def _names(directories: Sequence[epath.Path]) -> list[str]:
    """The last parts of the paths; the whole paths where two of them end alike."""
    names = [_whole(directory).rstrip("/").rpartition("/")[2] for directory in directories]
    return names if len(set(names)) == len(names) else [str(directory) for directory in directories]


def _notes(records: Records) -> list[str]:
    return [
        f'<p class="note">The last line of {html.escape(file)} was not written to its end and is left out.</p>'
        for file in records.cut
    ]


def _last_values(records: Records) -> str:
    return "\n".join(
        table((title, ""), [(key, _text(key, value)) for key, value in rows[-1].items()])
        for title, rows in (("Training", records.train), ("Evaluation", records.evaluation))
        if rows
    )


def _side_by_side(runs: Mapping[str, Records]) -> str:
    rows = []
    for name, records in runs.items():
        train = records.train[-1] if records.train else {}
        evaluation = records.evaluation[-1] if records.evaluation else {}
        best = min((row["eval_loss"] for row in records.evaluation), default=None)
        updates = max(row["step"] for row in records.train + records.evaluation)
        last = [_text(key, train.get(key)) for key in COMPARED]
        rows.append((name, f"{updates:,}", _text("eval_loss", evaluation.get("eval_loss")), _text("loss", best), *last))
    return table(("run", "updates", "eval_loss", "best eval_loss", *COMPARED), rows)


def _differences(runs: Mapping[str, Records]) -> str:
    """Every key whose values are not the same in all configs, but for the run's own directory."""
    configs = [dict(_leaves(OmegaConf.to_container(OmegaConf.create(run.config)))) for run in runs.values()]
    keys = dict.fromkeys(key for config in configs for key in config if key != "run_dir")
    rows = []
    for key in keys:
        values = [str(config.get(key, "")) for config in configs]
        if len(set(values)) > 1:
            rows.append((key, *values))
    return table(("", *runs), rows) if rows else "<p>Nowhere.</p>"


def _leaves(tree: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings by full key; a list is one value."""
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{above}.{key}" if above else str(key))
    else:
        yield above, tree


def _starts(starts: Sequence[Row], whose: str = "") -> list[str]:
    """What each start was made with; nothing where it is not known."""
    if not starts:
        return []
    rows = []
    for start in starts:
        commit = start.get("commit")
        changed = " with changes" if start.get("dirty") else ""
        versions = ", ".join(f"{name} {version}" for name, version in start.get("versions", {}).items() if version)
        devices = ", ".join(f"{found['count']} {found['kind']}" for found in start.get("devices", ()))
        rows.append(
            (
                str(start.get("time")),
                f"{start.get('step')}",
                f"{commit[:12]}{changed}" if commit else "not known",
                f"{devices}, {start.get('processes')} process(es)",
                f"{versions}, {start.get('system')}",
            )
        )
    head = ("started (UTC)", "after updates", "commit of lmjax", "devices", "versions")
    return [f"<h2>{html.escape(whose)}Starts</h2>\n{table(head, rows)}"]


def _text(key: str, value: Any) -> str:
    if value is None:
        return "not known"
    if key == "time":
        return datetime.datetime.fromtimestamp(value, datetime.UTC).isoformat(sep=" ", timespec="seconds")
    if isinstance(value, float) and not key.endswith("loss"):  # of losses every digit, to compare bits
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _samples(rows: Sequence[Row]) -> list[str]:
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
    return parts
