"""What the text of a compiled program says about its collectives and the shapes of its arrays.

Instructions are counted as they stand in the text, those of a loop's body once, however often the loop runs it; but by
``sent_by_axis`` as often as they run.
"""

import collections as containers
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*)$")
_GROUPS_OF_ONE = re.compile(r"replica_groups=(?:\{\{\d+\}|\[\d+,1\]<=)")
_GROUPS_BY_AXES = re.compile(
    r"replica_groups=mesh\[(?P<sizes>[^\]]*)\]"
    r"(?:, device_ids=\(\[(?P<order>[\d,]+)\](?:T\((?P<axes>[\d,]+)\))?\))? ?\{(?P<differ>[^}]*)\}"
)
_GROUPS_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_GROUPS_BY_ORDER = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]+\})\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_LESS = re.compile(r"%?[\w.\-]+, %?([\w.\-]+)\), direction=LT")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_VECTOR_MEMORY = re.compile(r'(?<=used_scoped_memory_configs":\[)\{"memory_space":"1","offset":"\d+","size":"(\d+)"\}')
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


def kernel_memory(text: str) -> dict[str, int]:
    """Bytes of vector memory that the kernels of a program for TPU take, the most of those of one name."""
    found: dict[str, int] = {}
    for instruction in instructions(text):
        if instruction.kind == "custom-call" and "tpu_custom_call" in instruction.arguments:
            name = instruction.name.rstrip(".0123456789")
            sizes = sum(map(int, _VECTOR_MEMORY.findall(instruction.arguments)))
            found[name] = max(found.get(name, 0), sizes)
    return found


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
    totals: dict[str, Collective] = {}
    for found in _collectives(text):
        count, total = totals.get(found.kind, (0, 0))
        totals[found.kind] = Collective(count + 1, total + found.bytes)
    return dict(sorted(totals.items()))


class Sent(NamedTuple):
    """What a program sends along axes of the mesh, in all the times that its loops run."""

    axes: str
    """Joined by +: the devices of a group differ in all of these."""
    kind: str
    count: int
    bytes: int
    """That one device receives: of a gather all but its own part, of an all-reduce twice that."""


def sent_by_axis(text: str, sizes: Mapping[str, int]) -> list[Sent]:
    """The collectives of a program by mesh axis, for a mesh with ``sizes`` whose devices are in the program's order.

    A loop that does not count up to a constant counts once.
    """
    times = _times(text)
    totals: containers.Counter[tuple[str, str]] = containers.Counter()
    counts: containers.Counter[tuple[str, str]] = containers.Counter()
    for found in _collectives(text):
        group = _group(found.arguments)
        differ = np.ptp(np.stack(np.unravel_index(group, tuple(sizes.values()))), axis=1) > 0
        key = "+".join(axis for axis, differs in zip(sizes, differ, strict=True) if differs), found.kind
        share = 1.0 if found.kind == "collective-permute" else (len(group) - 1) / len(group)
        runs = times[found.computation]
        counts[key] += runs
        totals[key] += round(runs * found.bytes * share * (2 if found.kind == "all-reduce" else 1))
    return [Sent(*key, counts[key], totals[key]) for key in sorted(totals, key=lambda key: -totals[key])]


def _group(arguments: str) -> np.ndarray:
    """The devices of a collective's first group, by their numbers in the program."""
    if found := _PAIRS.search(arguments):
        pairs = [tuple(map(int, pair.split(","))) for pair in found[1].strip("{}").split("},{")]
        return np.array(next((pair for pair in pairs if pair[0] != pair[1]), pairs[0]))
    if found := _GROUPS_LISTED.search(arguments):
        return np.array([int(number) for number in found[1].split(",")])
    if found := _GROUPS_BY_AXES.search(arguments):
        named = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", found["sizes"])]
        axes = re.findall(r"'(\w+)'", found["differ"])
        shape = [size for _, size in named]
        numbers = _numbers(found["order"] or str(math.prod(shape)), found["axes"]).reshape(shape)
        return numbers[tuple(slice(None) if name in axes else 0 for name, _ in named)].reshape(-1)
    found = _GROUPS_BY_ORDER.search(arguments)
    assert found is not None, f"groups that this does not read: {arguments[:300]}"
    return _numbers(found[2], found[3]).reshape(int(found[1].split(",")[0]), -1)[0]


def _numbers(dims: str, axes: str | None) -> np.ndarray:
    """0, 1, … in an array of ``dims``, with its dimensions in the order ``axes``."""
    sizes = [int(size) for size in dims.split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers if axes is None else numbers.transpose([int(axis) for axis in axes.split(",")])


def _times(text: str) -> Mapping[str, int]:
    """How often each computation of a program runs."""
    calls = containers.defaultdict(list)
    called = set()
    names = set()
    bounds = _loop_bounds(text)
    for instruction in instructions(text):
        names.add(instruction.computation)
        trips = 1
        if instruction.kind == "while":
            told, condition = _TRIPS.search(instruction.arguments), _CONDITION.search(instruction.arguments)
            assert condition is not None
            trips = int(told[1]) if told else bounds.get(condition[1], 1)
        for one, several in _CALLED.findall(instruction.arguments):
            for name in [one] if one else re.findall(r"[\w.\-]+", several):
                calls[name].append((instruction.computation, trips))
                called.add(name)

    @functools.cache
    def times(name: str) -> int:
        return sum(times(caller) * trips for caller, trips in calls[name]) if name in called else 1

    return {name: times(name) for name in names}


def _loop_bounds(text: str) -> dict[str, int]:
    """Of computations that compare a counter with a constant, the conditions of loops from 0, that constant."""
    constants, found = {}, {}
    for instruction in instructions(text):
        if instruction.kind == "constant" and (value := re.match(r"(\d+)\)", instruction.arguments)):
            constants[instruction.name] = int(value[1])
        elif instruction.kind == "compare" and (operands := _LESS.match(instruction.arguments)):
            found[instruction.computation] = operands[1]
    return {computation: constants[name] for computation, name in found.items() if name in constants}


class _Found(NamedTuple):
    kind: str
    computation: str
    bytes: int
    """Of the operand or the result, whichever is larger."""
    arguments: str


def _collectives(text: str) -> Iterator[_Found]:
    """Those that send something; an asynchronous one by its start."""
    found = list(instructions(text))
    types = {instruction.name: instruction.type for instruction in found}
    for instruction in found:
        kind = instruction.kind.removesuffix("-start")
        if kind not in KINDS or _is_alone(instruction.arguments):
            continue
        if kind == "all-reduce" and instruction.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        operands = re.findall(r"%([\w.\-]+)", instruction.arguments.partition(")")[0])
        operand_bytes = sum(num_bytes(types.get(name, "")) for name in operands)
        # The type of a start holds operands, results and what the device notes, of which only the sizes are known; that
        # of an all-reduce has its operands in a tuple of their own, or only results.
        is_start = instruction.kind.endswith("-start") and (kind != "all-reduce" or instruction.type.startswith("(("))
        result_bytes = num_bytes(instruction.type) - (operand_bytes if is_start else 0)
        yield _Found(kind, instruction.computation, max(operand_bytes, result_bytes), instruction.arguments)


def _is_alone(arguments: str) -> bool:
    """Whether the groups of a collective are of one device: listed, counted, or named by axes of a mesh."""
    if found := _GROUPS_BY_AXES.search(arguments):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found["sizes"]))
        axes = re.findall(r"'(\w+)'", found["differ"])
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
