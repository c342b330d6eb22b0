"""A plan as one HTML file that needs no other: pictures of a device's memory, of the mesh and of a step's time."""

import html
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from lmjax.paths import as_path
from lmjax.plan.cost import HOST_LINK, LINKS
from lmjax.plan.picture_mesh import axis_rows, draw_mesh, explanation, ink, layout, part_name
from lmjax.plan.topology import parse_topology
from lmjax.plan.words import GIB, gib, mesh_text, moments_text, remat_text
from lmjax.train.curves import BLUE, GREY, RED
from lmjax.train.page import images, page, table, to_png, write_page

KINDS = {
    "parameters": ("#1f4e79", "parameters"),
    "moments": ("#4a86b8", "moments of the optimizer"),
    "gradients": ("#9dc3e0", "gradients"),
    "weights": ("#7a5195", "copies of parameters, cast or gathered"),
    "tables": ("#b79ac8", "tables of the vocabulary and their gradients"),
    "saved": ("#3b7d4f", "saved for the backward pass"),
    "activations": ("#86bf8e", "activations"),
    "attention": ("#c9b037", "attention"),
    "logits": ("#e08e45", "logits"),
    "batch": ("#8a8a8a", "batch"),
}
"""Colour and meaning of each kind of array, what lasts from step to step first: the order of a bar's segments."""

FAR = 5
"""A device with this many times the memory of the longest bar is not on the bars' scale: it would hide them."""


class Segment(NamedTuple):
    """A part of a bar, in bytes."""

    kind: str
    start: int
    length: int


class Bar(NamedTuple):
    """The memory of a device at one stage of the step."""

    name: str
    segments: tuple[Segment, ...]

    @property
    def end(self) -> int:
        return sum(segment.length for segment in self.segments)


def write_plan(found: Mapping[str, Any], file: str) -> None:
    """Write the page of a plan, given what ``as_json`` has of it and the command adds.

    Raises InputError where the file's directory does not exist, or the store of an object cannot be used.
    """
    write_page(as_path(file), render(found), "--report")


def render(found: Mapping[str, Any]) -> str:
    """The HTML of a plan's page."""
    arrays = [(row["kind"], row["name"], gib(row["bytes"])) for row in found["arrays"]]
    parts = [
        table(("", ""), facts(found)),
        "<h2>Memory of a device</h2>",
        images([("A bar for each stage of a step, of what fills a device's memory", draw_memory(found))]),
        f"<p>At the peak, the {html.escape(found['peak'])}:</p>",
        table(("kind", "arrays", "GiB"), arrays),
        "<h2>Mesh</h2>",
        images([("The devices of the mesh, by what they share", draw_mesh(found))]),
        f'<p class="note">{html.escape(explanation(found))}</p>',
        *_axes(found),
    ]
    if found["bounds"] is not None:
        description = "A bar for each part of a step, as long as it takes at the hardware's peak"
        parts += ["<h2>Time of a step</h2>", images([(description, draw_bounds(found))])]
    parts += [f"<h2>{title}</h2>\n{table(head, rows)}" for title, head, rows in _sent(found) if rows]
    if "search" in found:
        search = found["search"]
        title = f"The best of {search['fitting']:,} that fit, of {search['tried']:,}"
        head = ("predicted seconds", "bound", "mesh", "remat", "micro-batches", "moments on", "GiB")
        parts.append(f"<h2>{title}</h2>\n{table(head, [_candidate(row) for row in search['ranking']])}")
    return page(f"Plan for {found['topology']}", parts)


def facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table at the top."""
    estimate, compiled = found["estimate_bytes"], found.get("compiled_bytes")
    rows = [
        ("topology", found["topology"]),
        ("devices", f"{found['devices']:,}"),
        ("mesh", mesh_text(found["mesh"])),
        ("parameters", f"{found['parameters']:,}"),
        ("parameters that a token goes through", f"{found['active_parameters']:,}"),
        ("tokens a step", f"{found['tokens_per_step']:,}"),
        *((f"attention of {kind} blocks", f"{it['name']}: {it['why']}") for kind, it in _kernels(found)),
        ("memory of a device, estimate", f"{gib(estimate)} GiB, with the compilers of {found['estimate_of']}"),
    ]
    if compiled is not None:
        error = f"the estimate is {100 * (estimate / compiled - 1):+.1f}% off"
        rows.append(("memory of a device, as compiled", f"{gib(compiled)} GiB; {error}"))
    rows.append(("fits", verdict(found)))
    if found["bounds"] is None:
        return [*rows, ("speed", "not known for CPUs")]
    rows += [
        ("a step at the hardware's peak (bound)", f"{found['step_seconds_bound']:.4g} s"),
        ("a step as predicted", f"{found['step_seconds_predicted']:.4g} s"),
        ("tokens a second at the bound", f"{found['tokens_per_second_bound']:,.0f}"),
        ("MFU at the bound", f"{100 * found['mfu_bound']:.0f}%"),
    ]
    if "run_cost_bound" in found:
        cost = f"{found['step_cost_bound']:.4g} a step, {found['run_cost_bound']:,.2f} the run"
        rows.append(("cost at the bound", cost))
    return rows


def verdict(found: Mapping[str, Any]) -> str:
    """Whether the step fits, by which figure, and what is left or missing."""
    memory = found["device_bytes"]
    if memory is None:
        return "not known: CPUs have no memory of their own"
    if found["fits"] is None:
        return f"for --compile to say, of {gib(memory)} GiB: not in the estimate is {found['unaccounted']}"
    compiled = found.get("compiled_bytes")
    left = memory - (found["estimate_bytes"] if compiled is None else compiled)
    by = f"with a margin of {100 * found['margin']:.0f}%" if compiled is None else "as compiled"
    room = f"{gib(left)} GiB are left" if left >= 0 else f"{gib(-left)} GiB are missing"
    return f"{'yes' if found['fits'] else 'no'}, {by}: of {gib(memory)} GiB {room}"


def stage_bars(found: Mapping[str, Any]) -> list[Bar]:
    """A bar for each stage in the order of the step; segments follow each other, in the order of KINDS."""
    bars = []
    for stage in found["stages"]:
        segments, start = [], 0
        for kind in sorted(stage["by_kind"], key=list(KINDS).index):
            segments.append(Segment(kind, start, stage["by_kind"][kind]))
            start += stage["by_kind"][kind]
        bars.append(Bar(stage["name"], tuple(segments)))
    return bars


def draw_memory(found: Mapping[str, Any]) -> bytes:
    """The PNG of the stages, with the device's memory and the compiler's figure as lines."""
    bars, compiled = stage_bars(found), found.get("compiled_bytes")
    memory: int | None = found["device_bytes"]
    longest = max(bar.end for bar in bars)
    peak = [bar.end for bar in bars].index(longest)  # of stages alike, the first
    margin = found["margin"] if memory is not None and compiled is None and found["fits"] is not None else 0
    end = max(longest * (1 + margin), compiled or 0)
    near = memory if memory is not None and memory <= FAR * end else None
    end = max((1.3 if margin else 1.15) * end, 1.04 * (near or 0))  # room for what stands behind the longest bar
    figure = Figure(figsize=(11, 1.9 + 0.5 * len(bars)), layout="constrained")
    axes = figure.subplots()
    drawn = [kind for kind in KINDS if any(segment.kind == kind for bar in bars for segment in bar.segments)]
    for kind in drawn:
        colour, label = KINDS[kind]
        at = [(y, segment) for y, bar in enumerate(bars) for segment in bar.segments if segment.kind == kind]
        places, lengths, starts = zip(*((y, part.length / GIB, part.start / GIB) for y, part in at), strict=True)
        axes.barh(
            places, lengths, left=starts, color=colour, height=0.62, edgecolor="white", linewidth=0.6, label=label
        )
        for y, part in at:
            if part.length > 0.06 * end:
                middle = (part.start + part.length / 2) / GIB
                axes.text(middle, y, gib(part.length), ha="center", va="center", fontsize=8, color=ink(colour))
    for y, bar in enumerate(bars):
        beyond = margin * bar.end if y == peak else 0
        if beyond:
            label = f"{100 * margin:.0f}% more, with which it has to fit"
            left, width = bar.end / GIB, beyond / GIB
            axes.barh(y, width, left=left, height=0.62, color="white", edgecolor=GREY, hatch="////", label=label)
        told = f"{gib(bar.end)}, with these {gib(bar.end + beyond)}" if beyond else gib(bar.end)
        weight = "bold" if y == peak else "normal"
        text = axes.text((bar.end + beyond + 0.008 * end) / GIB, y, told, va="center", fontsize=9, weight=weight)
        text.set_bbox({"facecolor": "white", "linewidth": 0, "pad": 1.5})  # a line does not go through the figures
    lines = [(near, RED, "-", f"a device has {gib(near)} GiB")] if near else []
    lines += [(compiled, "black", "--", f"the compiler's figure, {gib(compiled)} GiB")] if compiled else []
    for num_bytes, colour, style, label in lines:
        axes.axvline(num_bytes / GIB, color=colour, linestyle=style, linewidth=1.6, label=label)
    title = "What a device holds at each stage of a step"
    if memory is not None and near is None:
        title += f" (of {gib(memory)} GiB, far to the right)"
    axes.set_title(title + (": does not fit" if found["fits"] is False else ""))
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars], parse_math=False)
    axes.set_ylim(len(bars) - 0.4, -0.7)
    axes.set_xlim(0, end / GIB)
    axes.set_xlabel("GiB")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    return to_png(figure)


def bound_bars(found: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The parts of a step with the seconds that each takes at the hardware's peak."""
    near, far = LINKS[parse_topology(found["topology"]).hardware.platform]
    names = {
        "links": f"links ({near})",
        "network": far if far == "network" else f"network ({far})",
        "host": f"host's memory ({HOST_LINK})",
        "waited_for": "waited for, of links and network",
    }
    names |= {"compute": "computing", "memory": "memory traffic"}
    return [(names[part], seconds) for part, seconds in found["bounds"].items() if part != "host" or seconds]


def draw_bounds(found: Mapping[str, Any]) -> bytes:
    """The PNG of the parts of a step, with the bound and the prediction as lines."""
    bars, bound, predicted = bound_bars(found), found["step_seconds_bound"], found["step_seconds_predicted"]
    figure = Figure(figsize=(11, 3), layout="constrained")
    axes = figure.subplots()
    seconds = [each for _, each in bars]
    colours = [BLUE if name != bars[-1][0] else "#9db7d5" for name, _ in bars]
    axes.barh(range(len(bars)), seconds, height=0.62, color=colours)
    for y, each in enumerate(seconds):
        axes.text(each + 0.006 * predicted, y, f"{each:.4g} s", va="center", fontsize=9)
    axes.axvline(bound, color=RED, linewidth=1.6, label=f"bound, everything at once: {bound:.4g} s")
    axes.axvline(predicted, color=RED, linestyle="--", linewidth=1.6, label=f"predicted: {predicted:.4g} s")
    axes.set_title("Parts of a step at the hardware's peak")
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.set_xlim(0, 1.1 * max(predicted, *seconds))
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return to_png(figure)


def _sent(found: Mapping[str, Any]) -> Iterable[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Titles, heads and rows of the tables of what a device receives."""
    totals: dict[tuple[str, str, str], int] = {}
    for row in found["traffic"]:  # one for each block, of experts
        key = row["axis"], row["what"], row["link"]
        totals[key] = totals.get(key, 0) + row["bytes"]
    rows = [(*key, gib(num_bytes)) for key, num_bytes in totals.items()]
    yield "What a device receives in a step", ("axis", "what", "link", "GiB"), rows
    rows = [(row["axes"], row["kind"], f"{row['count']:,}", gib(row["bytes"])) for row in found.get("sent", ())]
    yield "What it receives as compiled", ("axes", "collective", "count", "GiB"), rows


def _axes(found: Mapping[str, Any]) -> list[str]:
    rows, it = axis_rows(found), layout(found)
    if not rows:
        return []
    cut = f"cut into {part_name(found)}s" if it.slices > 1 else "cut"
    head = ("axis", "devices along it", cut, "has parts of", "over", "GiB")
    return ["<p>GiB are what a device receives in a step:</p>", table(head, rows)]


def _candidate(row: Mapping[str, Any]) -> tuple[str, ...]:
    train = row["train"]
    seconds = (f"{row['step_seconds_predicted']:.4g}", f"{row['step_seconds_bound']:.4g}")
    return (
        *seconds,
        mesh_text(row["mesh"]),
        remat_text(train["remat"]),
        f"{train['accumulation']}",
        moments_text(train),
        gib(row["estimate_bytes"]),
    )


def _kernels(found: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, str]]]:
    return found["attention_kernels"].items()
