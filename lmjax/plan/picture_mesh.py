"""The mesh of a plan as a picture: its devices as squares, by what they share, and what goes over which links."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps, colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lmjax.mesh import AXES, BATCH_AXES
from lmjax.plan.topology import parse_topology
from lmjax.plan.words import gib
from lmjax.train.page import to_png

SPLITS = {
    "data": "sequences; every position has parameters of its own, all alike",
    "fsdp": "parameters and sequences",
    "expert": "experts, the other parameters, sequences",
    "tensor": "heads, MLP and vocabulary, and with them the parameters",
}
"""What the devices along an axis have parts of."""

PARAMETER_AXES = tuple(axis for axis in AXES if axis != "data")
"""Those over which parameters are split."""

CELLS = 256
"""Squares of a slice or host, at most: beyond it one stands for several devices."""
ALL_CELLS = 512
"""Squares of a picture, at most: beyond it only the first slices or hosts are drawn."""
GAP = 0.3
"""Between turns of the last axis that stand in one row, in squares."""


class Cell(NamedTuple):
    """A device, or neighbours on the last axes of the mesh that are drawn as one."""

    slice: int
    row: int
    column: int
    devices: int
    parameters: tuple[int, int]
    """First and last of the parts of the parameters that its devices hold."""
    sequences: tuple[int, int]
    """The same of the parts of the batch that they work on."""


class Layout(NamedTuple):
    """The mesh as squares: slices or hosts side by side, each a grid that is filled row by row."""

    slices: int
    drawn: int
    """The first of the slices; the others go on in the same way."""
    rows: int
    columns: int
    turn: int
    """Squares of a turn of the last axis that is longer than a square: neighbours, with a gap behind them."""
    inside: Mapping[str, int]
    """Positions on each axis inside of a slice."""
    cells: tuple[Cell, ...]

    @property
    def devices_a_cell(self) -> int:
        return self.cells[0].devices


def places(found: Mapping[str, Any]) -> np.ndarray:
    """The devices of each slice or host, by their numbers in the mesh, whose last axis runs fastest.

    As ``make_mesh`` lays them out: an axis is cut first by its dcn part, or devices follow each other over the hosts.
    """
    topology, sizes = parse_topology(found["topology"]), [found["mesh"][axis] for axis in AXES]
    number = np.arange(topology.num_devices)
    across = [found["dcn"].get(axis, 1) for axis in AXES]
    if math.prod(across) > 1:
        inside = [size // parts for size, parts in zip(sizes, across, strict=True)]
        cut = [at // size for at, size in zip(np.unravel_index(number, sizes), inside, strict=True)]
        of_slice = np.ravel_multi_index(cut, across)
    else:
        of_slice = number // topology.slice_devices
    return np.argsort(of_slice, kind="stable").reshape(topology.slices, topology.slice_devices)


def layout(found: Mapping[str, Any]) -> Layout:
    """The squares of the mesh, and what their devices share with others."""
    members, sizes = places(found), found["mesh"]
    slices, size = members.shape
    at: dict[str, np.ndarray] = {}
    at |= zip(AXES, np.unravel_index(members, [sizes[axis] for axis in AXES]), strict=True)
    inside = {axis: len(np.unique(at[axis][0])) for axis in AXES}
    a_cell = next(count for count in range(1, size + 1) if size % count == 0 and size // count <= CELLS)
    columns = _columns(size // a_cell, [inside[axis] for axis in AXES], a_cell)
    drawn = min(slices, max(1, ALL_CELLS * a_cell // size))
    parameters, sequences = (_part(at, sizes, axes) for axes in (PARAMETER_AXES, BATCH_AXES))
    cells = []
    for slice_ in range(drawn):
        for number in range(size // a_cell):
            held = slice(number * a_cell, (number + 1) * a_cell)
            ends = [
                (int(parts[slice_, held].min()), int(parts[slice_, held].max())) for parts in (parameters, sequences)
            ]
            cells.append(Cell(slice_, number // columns, number % columns, a_cell, *ends))
    last = next((inside[axis] for axis in reversed(AXES) if inside[axis] > 1), 1)
    turn = last // a_cell if last % a_cell == 0 and last // a_cell < columns else columns
    return Layout(slices, drawn, size // a_cell // columns, columns, turn, inside, tuple(cells))


def _part(at: Mapping[str, np.ndarray], sizes: Mapping[str, int], axes: Sequence[str]) -> np.ndarray:
    """The number of the part that a device has of what is split over ``axes``."""
    return np.ravel_multi_index([at[axis] for axis in axes], [sizes[axis] for axis in axes])


def _columns(cells: int, inside: Sequence[int], a_cell: int) -> int:
    """A width of the grid with which each row has whole turns of the last axes, and which is near to half as high."""
    turns = [math.prod(inside[number:]) for number in range(len(inside) + 1)]
    whole = [width for width in range(1, cells + 1) if cells % width == 0]
    whole = [w for w in whole if all(w * a_cell % turn == 0 or turn % (w * a_cell) == 0 for turn in turns)] or whole
    return min(whole, key=lambda width: abs(math.log(width / math.sqrt(1.5 * cells))))


def draw_mesh(found: Mapping[str, Any]) -> bytes:
    """The PNG of the mesh, twice: what its devices hold of the parameters, and of the batch."""
    it, sizes = layout(found), found["mesh"]
    maps = [
        ("Parameters", PARAMETER_AXES, [cell.parameters for cell in it.cells]),
        ("Sequences", BATCH_AXES, [cell.sequences for cell in it.cells]),
    ]
    # Slices beside each other as far as there is room, and both maps beside each other where one slice is all.
    beside = it.drawn == 1
    wide, high = _size(it)
    a_row = max(1, min(it.drawn, int(48 // wide)))
    width, height = a_row * wide, -(-it.drawn // a_row) * high
    inches = min(0.62, (5.2 if beside else 10.6) / width)
    tall = height * inches + 0.45
    figure = Figure(figsize=(11, tall if beside else 2 * tall), layout="constrained")
    for axes, (title, of, parts) in zip(figure.subplots(*((1, 2) if beside else (2, 1))), maps, strict=True):
        num_parts = math.prod(sizes[axis] for axis in of)
        said = f" in {num_parts:,} parts; one number: the same part" if num_parts > 1 else ": all on every device"
        axes.set_title(title + said, fontsize=11)
        _squares(axes, it, parts, num_parts, a_row, inches, part_name(found))
        axes.set_xlim(-0.2, width - 0.8)
        axes.set_ylim(height - (high - it.rows), it.rows - high)
        axes.set_aspect("equal")
        axes.axis("off")
    return to_png(figure)


def _size(it: Layout) -> tuple[float, float]:
    """Of a slice, in squares: its width with gaps and what is left free, its height with its name."""
    return it.columns + 1 + GAP * (it.columns // it.turn - 1), it.rows + (1.0 if it.slices > 1 else 0.15)


def _squares(
    axes: Axes, it: Layout, parts: list[tuple[int, int]], num_parts: int, a_row: int, inches: float, name: str
) -> None:
    wide, high = _size(it)
    longest = max(len(_range(part)) for part in parts)
    points = min(9.0, 72 * inches * 0.9 / (0.62 * longest))
    for cell, part in zip(it.cells, parts, strict=True):
        x = cell.slice % a_row * wide + cell.column + GAP * (cell.column // it.turn)
        y = cell.slice // a_row * high + cell.row
        colour = colormaps["viridis"](part[0] / max(1, num_parts - 1))
        axes.add_patch(Rectangle((x, y), 0.92, 0.92, facecolor=colour, linewidth=0))
        if points >= 4:
            style = {"fontsize": points, "color": ink(colors.to_hex(colour)), "ha": "center", "va": "center"}
            axes.text(x + 0.46, y + 0.46, _range(part), **style)
    for number in range(it.drawn if it.slices > 1 else 0):
        x, y = number % a_row * wide, number // a_row * high
        axes.text(x, y - 0.15, f"{name} {number}", ha="left", va="bottom", fontsize=9)


def explanation(found: Mapping[str, Any]) -> str:
    """What the picture shows, in sentences."""
    it, name = layout(found), part_name(found)
    order = ", then ".join(f"{axis} ({size})" for axis, size in reversed([*it.inside.items()]) if size > 1)
    said = ["A square is a device." if it.devices_a_cell == 1 else f"A square is {it.devices_a_cell} devices."]
    if it.devices_a_cell == 1:
        said.append("The number in it is the part that it has, counted from 0.")
    else:
        said.append("The numbers in it are the first and the last of the parts that they have, counted from 0.")
    if order:
        said.append(f"Squares follow each other row by row, along {order}.")
    if it.drawn < it.slices:
        said.append(f"Drawn are the first {it.drawn} of {it.slices} {name}s; the others go on in the same way.")
    if name == "slice":
        said.append("This is the mesh as the program has it; which chip a square is, is decided where the run starts.")
    return " ".join(said)


def axis_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each axis with more than one device and each link that it goes over."""
    inside, rows = layout(found).inside, []
    for axis, size in found["mesh"].items():
        if size == 1:
            continue
        totals: dict[str, int] = {}
        for sent in found["traffic"]:
            if sent["axis"] == axis:
                totals[sent["link"]] = totals.get(sent["link"], 0) + sent["bytes"]
        cut = f"{size // inside[axis]} x {inside[axis]}"
        for link, num_bytes in totals.items() or [("nothing", 0)]:
            rows.append((axis, f"{size:,}", cut, SPLITS[axis], link, gib(num_bytes)))
    return rows


def part_name(found: Mapping[str, Any]) -> str:
    """What the devices that are close to each other form."""
    return "slice" if parse_topology(found["topology"]).hardware.platform == "tpu" else "host"


def _range(part: tuple[int, int]) -> str:
    return f"{part[0]}" if part[0] == part[1] else f"{part[0]}–{part[1]}"


def ink(colour: str) -> str:
    """A colour that is read on ``colour``."""
    red, green, blue = colors.to_rgb(colour)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.58 else "#222"
