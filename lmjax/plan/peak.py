"""Which arrays live when a compiled program needs the most memory, as the compiler's own dump has it."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lmjax.plan.hlo import array_list, instructions

_ALLOCATION = re.compile(r"allocation (\d+): size \d+, (.*)")
_VALUE = re.compile(r"\s+value: <\d+ ([\w.\-]+)(\{[\d,]*\})?(?: \(phi\))? @(\d+)> \(size=(\d+),offset=(\d+)\): (.*)")
_RANGE = re.compile(r"\s+([\w.\-]+)\{([\d,]*)\}:(\d+)-(\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class PeakArray(NamedTuple):
    """An array of one device."""

    bytes: int
    name: str
    """Of the instruction that makes it."""
    type: str
    """Such as bf16[2,512,768]."""
    scope: str
    """Where in the step it is made, as JAX names it; empty where the compiler made it of its own."""


class _Value(NamedTuple):
    name: str
    type: str
    allocation: int
    first: int
    """Byte of the allocation."""
    end: int
    begins: int
    """Step of the program."""
    ends: int


def dump_options(directory: Path) -> dict[str, str | bool]:
    """Options of a compile whose dump ``arrays_of_dump`` reads from ``directory``. What JAX has kept leaves none."""
    return {"xla_dump_to": str(directory), "xla_dump_hlo_as_text": True}


def arrays_of_dump(directory: Path) -> tuple[PeakArray, ...]:
    """What lives at the peak of the one program that was compiled with ``dump_options``, the largest first.

    Arrays in one place that follow each other are one; those that the compiler keeps nearer than in the device's
    memory are not among them.
    """
    (live,) = directory.glob("*after_optimizations-live-range.txt")
    program, assignment = (
        live.with_name(live.name.replace("-live-range", suffix)) for suffix in ("", "-buffer-assignment")
    )
    return tuple(read_peak(assignment.read_text(), live.read_text(), program.read_text()))


def read_peak(assignment: str, live_ranges: str, program: str) -> list[PeakArray]:
    """From the texts that XLA dumps of its buffer assignment, of live ranges and of the program.

    The peak that the second names is not asked: on TPU it is not where most memory is taken.
    """
    return _at_peak(_values(assignment, live_ranges), program)


def _values(assignment: str, live_ranges: str) -> list[_Value]:
    """Those in the device's memory, with the steps between which they live: parameters and results in all of them."""
    text = live_ranges.partition("BufferLiveRange:")[2].partition("Live ranges at")[0]
    ranges = {(found[1], found[2]): (int(found[3]), int(found[4])) for found in _RANGE.finditer(text)}
    last = max((end for _, end in ranges.values()), default=0)
    values, allocation, is_temporary = [], 0, False
    for line in assignment.splitlines():
        if found := _ALLOCATION.match(line):
            allocation, is_temporary = int(found[1]), "preallocated-temp" in found[2]
        elif (found := _VALUE.match(line)) and found[3] == "0":
            name, index = found[1], (found[2] or "").strip("{}")
            begins, ends = ranges.get((name, index), (0, last)) if is_temporary else (0, last)
            first, size = int(found[5]), int(found[4])
            types = array_list(found[6])
            type_ = str(types[0]) if len(types) == 1 else ""
            values.append(_Value(name, type_, allocation, first, first + size, begins, ends))
    return values


def _at_peak(values: list[_Value], program: str) -> list[PeakArray]:
    def living(step: int) -> list[_Value]:
        return [value for value in values if value.begins <= step <= value.ends]

    peak = max({value.begins for value in values}, key=lambda step: _covered(living(step)))
    scopes = {}
    for instruction in instructions(program):
        if found := _OP_NAME.search(instruction.arguments):
            scopes[instruction.name] = found[1].replace("\\'", "'")
    by_place: dict[tuple[int, int, int], list[_Value]] = {}
    for value in values:
        by_place.setdefault((value.allocation, value.first, value.end), []).append(value)
    arrays, end = [], (-1, -1)
    for place in sorted({(v.allocation, v.first, v.end) for v in living(peak)}, key=lambda at: (at[0], at[1], -at[2])):
        if place[0] == end[0] and place[2] <= end[1]:
            continue  # inside of the one before
        end = place[0], place[2]
        # What a loop carries has no name of its own; what it was made as, or is updated as, lies in the same place.
        in_place = [v for v in by_place[place] if v.begins <= peak <= v.ends] + by_place[place]
        named = next((v for v in in_place if v.name in scopes and v.type == in_place[0].type), in_place[0])
        arrays.append(PeakArray(place[2] - place[1], named.name, named.type, scopes.get(named.name, "")))
    return sorted(arrays, key=lambda array: array.bytes, reverse=True)


def _covered(values: Iterable[_Value]) -> int:
    """Bytes of memory that the values take, those that share a place once."""
    total, at = 0, (-1, 0)
    for value in sorted(values, key=lambda value: (value.allocation, value.first)):
        start = max(value.first, at[1]) if value.allocation == at[0] else value.first
        total += max(0, value.end - start)
        at = value.allocation, max(value.end, start)
    return total
