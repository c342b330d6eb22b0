"""Pictures of runs: losses and rates over the updates."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmjax.train.page import to_png
from lmjax.train.records import Records, Row


class Curve(NamedTuple):
    """One number of the rows of training over the updates."""

    field: str
    title: str
    unit: str


CURVES = (
    Curve("learning_rate", "Learning rate", ""),
    Curve("grad_norm", "Norm of the gradient, before clipping", ""),
    Curve("tokens_per_second", "Speed", "tokens/s"),
    Curve("mfu", "Model FLOPs utilisation", "of the peak"),
    Curve("data_wait_share", "Waiting for data", "of the time"),
)
"""Pictures of their own below the losses; one whose values are all unknown is left out."""

BLUE, RED, GREY = "#2c5f8a", "#c0392b", "#555"


def draw_curves(runs: Mapping[str, Records]) -> list[tuple[str, bytes]]:
    """Each picture as a description and a PNG, the losses first. Several runs, by name, have a colour each."""
    pictures = [
        ("Training and evaluation loss over the updates", _picture((11, 4.5), lambda axes: _losses(axes, runs)))
    ]
    for curve in CURVES:
        if any(row.get(curve.field) is not None for records in runs.values() for row in records.train):
            picture = _picture((6, 3.2), lambda axes, curve=curve: _rate(axes, curve, runs))
            pictures.append((f"{curve.title} over the updates", picture))
    return pictures


def _picture(size: tuple[float, float], draw: Callable[[Axes], None]) -> bytes:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.set_xlabel("finished updates")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return to_png(figure)


def _losses(axes: Axes, runs: Mapping[str, Records]) -> None:
    axes.set_title("Loss")
    axes.set_ylabel("nats a token")
    alone = len(runs) == 1
    for number, (name, records) in enumerate(runs.items()):
        colours = ("#9db7d5", RED) if alone else (_colour(number), _colour(number))
        whose = "" if alone else f"{name}, "
        if records.train:
            faint = 1.0 if alone or not records.evaluation else 0.35
            axes.plot(
                *_points(records.train, "loss"), color=colours[0], linewidth=1, alpha=faint, label=f"{whose}training"
            )
        if records.evaluation:
            style: dict[str, Any] = {"color": colours[1], "marker": "o", "markersize": 4}
            axes.plot(*_points(records.evaluation, "eval_loss"), label=f"{whose}evaluation", **style)
    for unigram in sorted({records.evaluation[-1]["unigram_loss"] for records in runs.values() if records.evaluation}):
        axes.axhline(unigram, color=GREY, linestyle="--", linewidth=1, label=f"unigram loss, {unigram:.3f}")
    axes.legend(frameon=False)


def _rate(axes: Axes, curve: Curve, runs: Mapping[str, Records]) -> None:
    axes.set_title(curve.title)
    axes.set_ylabel(curve.unit)
    for number, (name, records) in enumerate(runs.items()):
        marker = "o" if len(records.train) == 1 else None
        colour = BLUE if len(runs) == 1 else _colour(number)
        axes.plot(*_points(records.train, curve.field), color=colour, linewidth=1, marker=marker, label=name)
    axes.set_ylim(bottom=0)
    if len(runs) > 1:
        axes.legend(frameon=False, fontsize="small")


def _colour(number: int) -> str:
    return f"C{number % 10}"


def _points(rows: Sequence[Row], field: str) -> tuple[list[int], list[float]]:
    """Steps and values; a gap where a value is not known."""
    values = (row.get(field) for row in rows)
    return [row["step"] for row in rows], [math.nan if value is None else value for value in values]
