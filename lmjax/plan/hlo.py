"""What the text of a compiled program says about its collectives and the shapes of its arrays.

Instructions are counted as they stand in the text: those of a loop's body once, however often the loop runs it.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
_GROUPS_OF_ONE = re.compile(r"replica_groups=(?:\{\{\d+\}|\[\d+,1\]<=)")
_GROUPS_BY_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")


class Collective(NamedTuple):
    """The collectives of one kind in a program."""

    count: int
    bytes: int
    """On one device, over all of them, each run once: of the operand or the result, whichever is larger."""


class Instruction(NamedTuple):
    """One line of a program."""

    computation: str
    name: str
    type: str
    kind: str
    arguments: str
    """What follows the opening parenthesis: operands, then attributes."""


class ArrayShape(NamedTuple):
    """The type of an array on one device."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


def instructions(text: str) -> Iterator[Instruction]:
    """Every instruction of a program's text."""
    computation = ""
    for line in text.splitlines():
        if found := _INSTRUCTION.match(line):
            yield Instruction(computation, *found.groups())
        elif found := _COMPUTATION.match(line):
            computation = found[1]


def array_shapes(text: str) -> set[ArrayShape]:
    """The types of all arrays in a program, those inside fusions too, which never reach memory."""
    found = set()
    for instruction in instructions(text):
        found |= set(array_list(instruction.type))
    return found


def arrays_above(text: str, rows: int, columns: int) -> set[ArrayShape]:
    """The arrays of which one dimension has ``rows`` or more and another ``columns`` or more.

    With the length of a sequence for both, these are its T x T scores; with the length and the part of the vocabulary
    that a device holds, its T x V logits. A device's part of a matrix of parameters has to be smaller than that.
    """
    low, high = sorted((rows, columns))

    def is_above(shape: tuple[int, ...]) -> bool:
        largest = sorted(shape)[-2:]
        return len(largest) == 2 and largest[0] >= low and largest[1] >= high

    return {found for found in array_shapes(text) if is_above(found.shape)}


def collectives(text: str) -> dict[str, Collective]:
    """The collectives of a program, by kind.

    Those within groups of one device, which some compilers leave, send nothing and do not count. An asynchronous one
    counts once, by its start. What a TPU compiler calls all-reduce-scatter, an all-reduce whose result is cut up in the
    same fusion, is a reduce-scatter.
    """
    found = list(instructions(text))
    types = {instruction.name: instruction.type for instruction in found}
    totals: dict[str, Collective] = {}
    for instruction in found:
        kind = instruction.kind.removesuffix("-start")
        if kind not in KINDS or _is_alone(instruction.arguments):
            continue
        if kind == "all-reduce" and instruction.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        operands = re.findall(r"%([\w.\-]+)", instruction.arguments.partition(")")[0])
        operand_bytes = sum(num_bytes(types.get(name, "")) for name in operands)
        # The type of a start holds operands, results and what the device notes, of which only the sizes are known.
        is_start = instruction.kind.endswith("-start") and kind != "all-reduce"
        result_bytes = num_bytes(instruction.type) - (operand_bytes if is_start else 0)
        count, total = totals.get(kind, (0, 0))
        totals[kind] = Collective(count + 1, total + max(operand_bytes, result_bytes))
    return dict(sorted(totals.items()))


def _is_alone(arguments: str) -> bool:
    """Whether the groups of a collective are of one device: listed, counted, or named by axes of a mesh."""
    if found := _GROUPS_BY_AXES.search(arguments):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'", found[2])
        return all(sizes.get(axis) == "1" for axis in axes)
    return _GROUPS_OF_ONE.search(arguments) is not None


def num_bytes(type_: str) -> int:
    """The bytes of an array or of all arrays of a tuple, without padding."""
    total = 0.0
    for array in array_list(type_):
        total += math.prod(array.shape) * _bits(array.dtype) / 8
    return round(total)


def _bits(dtype: str) -> int:
    """Of one element: what the name says (bf16, s4, f8e4m3fn), a byte for pred; none for token."""
    width = re.search(r"\d+", dtype)
    return int(width[0]) if width else 8 if dtype == "pred" else 0


def array_list(type_: str) -> list[ArrayShape]:
    """The array that a type is, or those of a tuple in their order, without nesting."""
    # Layouts stand in braces, and what is in them looks like an array in places: {1,0:T(8,128)S(1)}.
    plain = re.sub(r"\{[^}]*\}", "", type_)
    found = _ARRAY.findall(plain)
    return [ArrayShape(dtype, tuple(int(dim) for dim in dims.split(",") if dim)) for dtype, dims in found]
