"""Which arrays live when a compiled program needs the most memory, as the compiler's own dump has it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lmjax.plan.hlo import array_list, instructions

_ARRAY = re.compile(r"\s+([\w.\-]+)\{([\d,]*)\}: (\d+) bytes")
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


def compile_with_peak(lowered: jax.stages.Lowered, directory: Path) -> tuple[jax.stages.Compiled, list[PeakArray]]:
    """The compiled program, and what lives at its peak, the largest first. The compiler writes into ``directory``."""
    options: Any = {"xla_dump_to": str(directory), "xla_dump_hlo_as_text": True}
    compiled = lowered.compile(compiler_options=options)
    (live,) = directory.glob("*after_optimizations-live-range.txt")
    program = live.with_name(live.name.replace("-live-range.txt", ".txt"))
    arrays = _at_peak(live.read_text(), program.read_text())
    return compiled, sorted(arrays, key=lambda array: array.bytes, reverse=True)


def _at_peak(live_ranges: str, program: str) -> Iterator[PeakArray]:
    known = {instruction.name: instruction for instruction in instructions(program)}
    for line in live_ranges.partition("(peak):")[2].splitlines()[1:]:
        found = _ARRAY.match(line)
        if found is None:  # the end of the list
            return
        name, index, size = found[1], found[2], int(found[3])
        types, scope = [], None
        if name in known:
            types = [str(array) for array in array_list(known[name].type)]
            scope = _OP_NAME.search(known[name].arguments)
        number = int(index) if index.isdecimal() else 0
        yield PeakArray(size, name, types[number] if number < len(types) else "", scope[1] if scope else "")
