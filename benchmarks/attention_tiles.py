"""What tiles suit the TPU kernel of attention, by generation and head dim: compiled on a CPU, and counted.

    python -m benchmarks.attention_tiles                            # all, an hour on two cores (libtpu)
    python -m benchmarks.attention_tiles --chips v5p --head-dims 128

An estimate, and no measurement: the instruction words (bundles) that the compiler schedules for a step of the grid, by
the steps of two rows of 8192 tokens, one causal document and eight of 1024. It knows nothing of waiting for memory or
for a unit that is busy. Each line is a JSON object: the bundles and the vector memory of each pass, and the thousands
of bundles of either row, forward and backward, for eight query heads on two kv heads. What the compiler refuses, or
does not finish, has its reason instead. The last line has the best of each generation and head dim, by the product of
the two rows: what ``lmjax.ops.attention_flash_tpu_tiles`` has.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from benchmarks.tpu_bundles import CHIPS, dumped_files, dumping_environment, innermost, read_regions
from benchmarks.versions import versions
from lmjax.ops.attention_flash_tpu import flash_attention_tpu
from lmjax.ops.attention_flash_tpu_tiles import Tiling
from lmjax.ops.attention_mask import Mask
from lmjax.ops.attention_tiles import FIRST, MASKED, most_steps, schedule, tile_ranges, visible_keys
from lmjax.plan.topology import topology_devices

HEAD_DIMS = (64, 128, 256)
TILES = (256, 512, 1024)
PARTS = (128, 256, 512)
LENGTH = 8192
HEADS, KV_HEADS = 8, 2
DOCUMENTS = {"causal": 1, "documents": 8}
"""Of equal length in each of the rows that are counted."""
COMPILE_SECONDS = 600
"""What compiles longer is as good as refused."""
SMALL_REGION = 50
"""Bundles of a region of a program, below which it does nothing of interest."""


class Bundles(NamedTuple):
    """Of a kernel's program."""

    masked: int
    """Of a step's visit with a mask."""
    unmasked: int
    edges: int
    """Of beginning and finishing a tile."""
    step: int
    """Of every step besides."""

    @classmethod
    def read(cls, lines: Iterable[str]) -> "Bundles":
        """From the compiler's text: the grid is a loop, and what is not done at every step a region inside it."""
        regions = read_regions(lines, SMALL_REGION)
        *edges, second, first = innermost(regions)
        masked, unmasked = sorted((first, second), key=lambda region: region.start)  # as the kernels have them
        counts = len(masked), len(unmasked), sum(map(len, edges))
        return cls(*counts, max(map(len, regions)) - sum(counts))

    def of_row(self, documents: int, tile: int, *, by_query: bool) -> int:
        """Of all steps for one head, or as many as a step has."""
        row = np.arange(LENGTH, dtype=np.int32) * documents // LENGTH + 1
        ranges = tile_ranges(visible_keys(Mask(), LENGTH, jnp.asarray(row)[None]), tile, tile)[0 if by_query else 1]
        most = most_steps(Mask(), LENGTH, tile, tile, has_prefix=False)[0 if by_query else 1]
        visits = schedule(ranges, LENGTH // tile, most)
        flags = np.asarray(visits.flags_W)[: int(visits.num_steps)]
        masked, tiles = (int(((flags & flag) != 0).sum()) for flag in (MASKED, FIRST))
        return (
            masked * self.masked + (len(flags) - masked) * self.unmasked + tiles * self.edges + len(flags) * self.step
        )


def compile_here(chip: str, head_dim: int, tiling: Tiling, names: list[str], dump: Path) -> dict[str, Any]:
    """By pass its bundles and the bytes of vector memory; ``dump`` is where the compiler was told to write."""
    sharding = SingleDeviceSharding(topology_devices(CHIPS[chip])[0])

    def shape(*sizes, dtype="bfloat16"):
        return jax.ShapeDtypeStruct((1, LENGTH, *sizes), dtype, sharding=sharding)

    def run(q, k, v, segment_ids, dout):
        def attend(q, k, v):
            return flash_attention_tpu(q, k, v, segment_ids, mask=Mask(), scale=0.1, tiling=tiling)

        if names == ["forward"]:
            return attend(q, k, v)
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, pull_back(dout)

    q, kv = shape(HEADS, head_dim), shape(KV_HEADS, head_dim)
    program = jax.jit(run).trace(q, kv, kv, shape(dtype="int32"), q).lower(lowering_platforms=("tpu",)).compile()
    kernels = [line for line in (program.as_text() or "").splitlines() if "tpu_custom_call" in line]
    found = {}
    for name in names:
        (file,) = (file for file in dumped_files(dump) if f"flash_{name}" in file.name)
        (kernel,) = (line for line in kernels if f"flash_{name}" in line.split("=")[0])
        used = re.findall(r'"used_scoped_memory_configs":\[{[^}]*"size":"(\d+)"', kernel)
        with file.open(errors="replace") as lines:
            found[name] = Bundles.read(lines)._asdict() | {"vmem": int(used[0])}
    return found


def compiled(case: tuple[str, int, int, int], names: tuple[str, ...]) -> dict[str, Any]:
    """``compile_here`` in a process of its own; or an error."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = [*map(str, case), ",".join(names), directory]
        command = [sys.executable, "-m", "benchmarks.attention_tiles", "--one", *arguments]
        environment = dumping_environment(directory)
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=False, timeout=COMPILE_SECONDS
            )
        except subprocess.TimeoutExpired:
            return {"error": f"not compiled within {COMPILE_SECONDS} s"}
        if done.returncode:
            reasons = [line for line in done.stderr.splitlines() if "Error" in line or "vmem" in line]
            return {"error": (reasons or done.stderr.splitlines())[-1][:300]}
        return json.loads(done.stdout.splitlines()[-1])


def told(chip: str, head_dim: int, tile: int) -> list[dict[str, Any]]:
    """A row for each part. How the backward pass is compiled does not depend on it."""
    passes = compiled((chip, head_dim, tile, PARTS[0]), ("forward", "dq", "dkv"))
    rows = []
    for part in PARTS:
        row: dict[str, Any] = {"chip": chip, "head_dim": head_dim, "tile": tile, "part": part}
        if part > tile:
            continue
        if part != PARTS[0] and "error" not in passes:
            passes |= compiled((chip, head_dim, tile, part), ("forward",))
        row |= passes
        if "error" not in passes:
            for name, documents in DOCUMENTS.items():
                bundles = 0
                for of_pass, found in passes.items():
                    counted = Bundles(*(found[field] for field in Bundles._fields))
                    bundles += counted.of_row(documents, tile, by_query=of_pass != "dkv")
                row[f"{name}_kilobundles"] = round(bundles / 1000, 1)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def best(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, list[int]]]:
    """By generation and head dim the tile and part of the lowest estimate."""

    def estimate(row):
        return row["causal_kilobundles"] * row["documents_kilobundles"]

    chosen: dict[str, dict[str, list[int]]] = {}
    by_case = sorted((row for row in rows if "error" not in row), key=lambda row: (row["chip"], row["head_dim"]))
    for (chip, head_dim), group in itertools.groupby(by_case, lambda row: (row["chip"], row["head_dim"])):
        row = min(group, key=estimate)
        chosen.setdefault(chip, {})[str(head_dim)] = [row["tile"], row["part"]]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--head-dims", nargs="+", type=int, default=HEAD_DIMS)
    parser.add_argument("--one", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        chip, head_dim, tile, part, names, dump = arguments.one
        tiling = Tiling(int(tile), int(part))
        print(json.dumps(compile_here(chip, int(head_dim), tiling, names.split(","), Path(dump))))
        return
    cases = itertools.product(arguments.chips, arguments.head_dims, TILES)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [row for rows in pool.map(lambda case: told(*case), cases) for row in rows]
    print(json.dumps({"best": best(rows), "versions": versions("jax", "libtpu")}))


if __name__ == "__main__":
    main()
