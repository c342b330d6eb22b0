"""Which tensors are not as a model has them, as a list that is read in one look."""

import re
from collections.abc import Mapping, Sequence

SHOWN = 6
"""Names of one kind, once layers are counted as one."""


def describe_mismatch(groups: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """One paragraph for each group of (name, what about it) that is not empty; "" where all are."""
    lines: list[str] = []
    for title, found in groups.items():
        if found:
            count = "1 tensor" if len(found) == 1 else f"{len(found)} tensors"
            lines.append(f"{count} {title}:")
            collapsed = _collapse(found)
            lines += [f"  {line}" for line in collapsed[:SHOWN]]
            if len(collapsed) > SHOWN:
                lines.append(f"  and {len(collapsed) - SHOWN} more of such names")
    return "\n".join(lines)


def _collapse(found: Sequence[tuple[str, str]]) -> list[str]:
    """One line for all layers, and for all experts of these, of which the same is said."""
    lines = [(*_without_number(name), what) for name, what in found]
    # The last number is an expert's where there are two, and where there is one, a layer's.
    by_layers = _gathered(lines)
    return [f"{name}: {what}" for name, what in _gathered([(*_without_number(name), what) for name, what in by_layers])]


def _without_number(name: str) -> tuple[str, int | None]:
    """The name with * for the last number in it that stands alone, and the number."""
    numbers = list(re.finditer(r"(?<=\.)\d+(?=\.)", name))
    if not numbers:
        return name, None
    last = numbers[-1]
    return f"{name[: last.start()]}*{name[last.end() :]}", int(last[0])


def _gathered(lines: Sequence[tuple[str, int | None, str]]) -> list[tuple[str, str]]:
    """The names with all numbers for *."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for template, number, what in lines:
        numbers.setdefault((template, what), []).extend([] if number is None else [number])
    return [(template.replace("*", _spans(found), 1), what) for (template, what), found in numbers.items()]


def _spans(numbers: Sequence[int]) -> str:
    """0,1,2,5 as {0..2,5}; a single number as it is."""
    if len(numbers) == 1:
        return str(numbers[0])
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return f"{{{','.join(str(first) if first == last else f'{first}..{last}' for first, last in spans)}}}"
