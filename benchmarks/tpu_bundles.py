"""The instruction words (bundles) that the TPU compiler schedules for a kernel, read from what it writes down."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
"""The smallest slice of each generation, to compile for one of its chips."""


def dumping_environment(directory: str) -> dict[str, str]:
    """Of a process whose TPU compiler writes the final bundles of every program into ``directory``."""
    flags = {"dump_to": directory, "dump_llo_text": "true", "dump_llo_pass_label_regex": "final_bundles"}
    init = " ".join(f"--xla_jf_{name}={value}" for name, value in flags.items())
    return os.environ | {"LIBTPU_INIT_ARGS": init, "JAX_PLATFORMS": "cpu"}


def dumped_files(directory: str | Path) -> list[Path]:
    """One for each program, with the program's name in its own."""
    every = Path(directory).glob("*-final_bundles.txt")
    return [file for file in every if "schedule-analysis" not in file.name]


def read_regions(lines: Iterable[str], smallest: int) -> list[range]:
    """The addresses of all regions (loops, branches) of a program that have ``smallest`` bundles."""
    bundle, begun, found = 0, {}, set()
    for line in lines:
        if address := re.match(r"\s*(0x[0-9a-f]+)\s", line):
            bundle = int(address.group(1), 16)
        for kind, number in re.findall(r"(Start|End) region (\d+)", line):
            if kind == "Start":
                begun[number] = bundle
            elif number in begun:
                found.add(range(begun.pop(number), bundle + 1))
    return [region for region in found if len(region) >= smallest]


def innermost(regions: list[range]) -> list[range]:
    """Those without another one inside, by their size."""
    inner = [x for x in regions if not any(y != x and y[0] in x and y[-1] in x for y in regions)]
    return sorted(inner, key=len)
