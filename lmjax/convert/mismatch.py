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
    """One line for all layers of which the same is said."""
    layers: dict[tuple[str, str], list[int]] = {}
    for name, what in found:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        template = name if number is None else f"{name[: number.start()]}*{name[number.end() :]}"
        layers.setdefault((template, what), []).extend([] if number is None else [int(number[0])])
    return [f"{template.replace('*', _spans(numbers), 1)}: {what}" for (template, what), numbers in layers.items()]


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
