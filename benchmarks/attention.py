"""Attention kernels: what they compute and how fast on the accelerator here, or what they compile to for absent TPUs.

    python -m benchmarks.attention --plot speeds.png  # on one GPU or TPU: numerics of each feature, then speeds
    python -m benchmarks.attention --small          # the same in tiny sizes, anywhere
    python -m benchmarks.attention --compile-only   # TPU kernels for five generations, on a CPU (libtpu)

Measured are the kernels of ``lmjax.ops.attention_kernels`` that can do what is asked on this hardware, and those of
other libraries that are installed (``attention_peers``). Numerics are the
largest differences of values and gradients from the reference in float32, by the largest value. Speeds are forward, and
forward with backward; operations are those of the visible pairs: 4 a pair, head and dimension forward, 2.5 times that
backward. All kernels take turns, round after round.

Of a compile: device memory besides inputs and results, and with ``--bundles`` the instruction words that the compiler
schedules to visit 512 x 512 pairs of one head, masked or not, in each pass: an estimate of time, without waiting for
memory. What one visit has of pairs, of a tile and all heads that it takes together, is told beside them. The last line
is one JSON object.
"""

import argparse
import functools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from benchmarks.attention_peers import Passes, as_numpy, of_jax, peers
from benchmarks.tpu_bundles import CHIPS, dumped_files, dumping_environment, innermost, read_regions
from benchmarks.versions import versions
from lmjax.compat import temporary_bytes
from lmjax.hardware import hardware, hardware_here
from lmjax.ops.attention_flash_tpu import flash_attention_tpu
from lmjax.ops.attention_flash_tpu_tiles import tiling_of
from lmjax.ops.attention_kernels import KERNELS, Wanted, wanted_features
from lmjax.ops.attention_mask import Mask
from lmjax.ops.attention_splash import BLOCK_SIZES, splash_attention
from lmjax.ops.attention_tiles import visible_keys
from lmjax.plan.topology import topology_devices

HEADS, KV_HEADS = 32, 8
COMPILED_HEADS, COMPILED_KV_HEADS = 8, 2
PACKAGES = ("jax", "jaxlib", "libtpu", "torch", "flash-attn", "tokamax")
FAILURES = (RuntimeError, ValueError, TypeError, ImportError, AttributeError, AssertionError)
"""What libraries raise for what they cannot do, or have no memory for."""


class Problem(NamedTuple):
    """One attention."""

    name: str
    length: int
    rows: int = 1
    head_dim: int = 128
    mask: Mask = Mask()
    documents: int = 0
    """Of equal length in each row; 0: nothing is said of segments."""
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    prefix: bool = False

    @property
    def features(self) -> frozenset[str]:
        return wanted_features(
            self.mask,
            segments=self.documents > 0,
            prefix=self.prefix,
            softcap=self.softcap is not None,
            alibi=self.alibi,
            sinks=self.sinks,
        )

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def segment_ids(self) -> jax.Array | None:
        if not self.documents:
            return None
        ids = np.arange(self.length) * self.documents // self.length + 1
        return jnp.asarray(np.broadcast_to(ids, (self.rows, self.length)), jnp.int32)

    def extras(self, heads: int) -> dict[str, jax.Array]:
        given = {}
        if self.prefix:
            given["prefix_BT"] = jnp.broadcast_to(jnp.arange(self.length) < self.length // 4, (self.rows, self.length))
        if self.alibi:
            given["slopes_N"] = 2.0 ** -jnp.linspace(1, 8, heads)
        if self.sinks:
            given["sinks_N"] = jnp.linspace(-1, 1, heads)
        return given

    def operations(self, heads: int) -> float:
        """Of the forward pass."""
        visible = visible_keys(self.mask, self.length, self.segment_ids())
        pairs = float(np.asarray(visible.end_BT - visible.first_BT, np.float64).sum())
        return 4 * pairs * (self.rows if len(visible.first_BT) == 1 else 1) * heads * self.head_dim


def features_of(length: int, head_dim: int) -> Iterator[Problem]:
    every = functools.partial(Problem, length=length, head_dim=head_dim)
    yield every("causal")
    yield every("bidirectional", mask=Mask(causal=False))
    yield every("window", mask=Mask(window=length // 5))
    yield every("packed", documents=5)
    yield every("softcap", softcap=20.0)
    yield every("alibi", alibi=True)
    yield every("sinks", sinks=True)
    yield every("prefix", prefix=True)
    yield every("all", mask=Mask(window=length // 3), documents=3, softcap=20.0, alibi=True, sinks=True)


def speeds_of(tokens: int, lengths: tuple[int, ...]) -> Iterator[Problem]:
    for head_dim in (64, 128, 256):
        for length in lengths:
            of_length = functools.partial(Problem, length=length, rows=max(1, tokens // length), head_dim=head_dim)
            yield of_length("causal")
            if head_dim == 128 and length >= 8 * 1024:
                yield of_length("window 1k", mask=Mask(window=1024))
                yield of_length("packed 1k", documents=length // 1024)


def able_kernels(problem: Problem, dtype: str) -> list[str]:
    wanted = Wanted(
        features=problem.features,
        hardware=hardware_here(),
        length=problem.length,
        head_dim=problem.head_dim,
        value_dim=problem.head_dim,
        dtype=dtype,
    )
    return [name for name, kernel in KERNELS.items() if kernel.objection(wanted) is None]


def attend_of(problem: Problem, kernel: str, heads: int) -> Callable[..., jax.Array]:
    """The kernel as a function of (q, k, v)."""
    entry = KERNELS[kernel]
    options: dict[str, Any] = entry.options_on(hardware_here()) | problem.extras(heads)
    if problem.softcap is not None:
        options["softcap"] = problem.softcap
    segment_ids = problem.segment_ids()
    return lambda q, k, v: entry.attend(q, k, v, segment_ids, mask=problem.mask, scale=problem.scale, **options)


def arrays(problem: Problem, heads: int, kv_heads: int, dtype: str) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shape = problem.rows, problem.length
    of_heads = [(*shape, number, problem.head_dim) for number in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(rng.standard_normal(sizes, np.float32), dtype) for sizes in of_heads]


def ready_passes(problem: Problem, given: list[jax.Array], heads: int) -> dict[str, Passes | str]:
    """Of all kernels here and all peers that can, compiled side by side; what went wrong where something did."""
    makers: dict[str, Callable[[], Passes]] = {
        name: functools.partial(of_jax, attend_of(problem, name, heads), given)
        for name in able_kernels(problem, str(given[0].dtype))
        if name != "reference" or problem.length <= 4096
    }
    makers |= dict(peers(problem.features, problem.mask.window, given, problem.scale))

    def made(make: Callable[[], Passes]) -> Passes | str:
        try:
            passes = make()
            passes.forward()
            if passes.both is not None:
                passes.both()
            return passes
        except FAILURES as error:  # the others are still to be measured
            return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"

    with ThreadPoolExecutor() as pool:
        return dict(zip(makers, pool.map(made, makers.values()), strict=True))


def numerics(problem: Problem, dtype: str) -> dict[str, Any]:
    """By kernel the differences of (out, dq, dk, dv) from the reference in float32."""
    heads, kv_heads = 4, 2
    given = arrays(problem, heads, kv_heads, dtype)
    with jax.default_matmul_precision("highest"):
        exact = of_jax(attend_of(problem, "reference", heads), [x.astype("float32") for x in given])
    assert exact.both is not None
    truth = [as_numpy(x) for x in exact.both()]
    found: dict[str, Any] = {}
    for name, passes in ready_passes(problem, given, heads).items():
        if isinstance(passes, str):
            found[name] = passes
            continue
        results = [passes.forward()] if passes.both is None else passes.both()
        differences = (np.abs(as_numpy(x) - y).max() / np.abs(y).max() for x, y in zip(results, truth, strict=False))
        found[name] = [float(f"{float(difference):.2g}") for difference in differences]
    return found


def speeds(problem: Problem, dtype: str, rounds: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """By kernel TFLOP/s forward, and of forward and backward together."""
    ready = ready_passes(problem, arrays(problem, heads, kv_heads, dtype), heads)
    found: dict[str, Any] = {name: passes for name, passes in ready.items() if isinstance(passes, str)}
    runs = {
        (name, of_pass): run
        for name, passes in ready.items()
        if isinstance(passes, Passes)
        for of_pass, run in passes._asdict().items()
        if run is not None
    }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - began)
    operations = problem.operations(heads)
    for (name, of_pass), times in seconds.items():
        done = operations * (1 if of_pass == "forward" else 3.5)
        median = statistics.median(times)
        told = {"ms": round(median * 1e3, 3), "tflops": round(done / median / 1e12, 1)}
        found.setdefault(name, {})[of_pass] = told
    return found


def measure(*, small: bool, rounds: int) -> dict[str, Any]:
    dtype = "float32" if small else "bfloat16"
    checked = [
        problem
        for head_dim in ((16,) if small else (128, 64, 256))
        for problem in features_of(160 if small else 1000, head_dim)
    ]
    timed = [Problem("causal", 64, head_dim=16)] if small else list(speeds_of(16 * 1024, (1024, 4096, 8192, 32768)))
    heads = (4, 2) if small else (HEADS, KV_HEADS)
    return {
        "numerics": [
            {"problem": problem.name, "head_dim": problem.head_dim, "differences": numerics(problem, dtype)}
            for problem in checked
        ],
        "speeds": [
            {"problem": problem.name, "length": problem.length, "rows": problem.rows, "head_dim": problem.head_dim}
            | speeds(problem, dtype, rounds, *heads)
            for problem in timed
        ],
        "dtype": dtype,
        "device": jax.devices()[0].device_kind,
    }


def draw(speeds: list[dict[str, Any]], device: str, file: Path) -> None:
    """Forward and backward together, by kernel: a picture of TFLOP/s over lengths for each problem and head_dim."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, int], dict[str, list[tuple[int, float]]]] = {}
    for row in speeds:
        lines = panels.setdefault((row["problem"], row["head_dim"]), {})
        for name, told in row.items():
            if isinstance(told, dict) and "both" in told:
                lines.setdefault(name, []).append((row["length"], told["both"]["tflops"]))
    figure = Figure(figsize=(4 * len(panels), 4), layout="constrained")
    figure.suptitle(f"attention, forward and backward, on {device}")
    for ax, ((problem, head_dim), lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name, points in lines.items():
            ax.plot(*zip(*points, strict=True), marker="o", label=name)
        ax.set(title=f"{problem}, head_dim {head_dim}", xlabel="positions", ylabel="TFLOP/s", xscale="log", ylim=0)
        ax.legend()
    figure.savefig(file)


def compile_one(topology: str, kernel: str, length: int) -> dict[str, Any]:
    """Forward and backward of one packed causal row, for the first device of ``topology``."""
    device = topology_devices(topology)[0]
    generation = hardware(device).generation
    attend, visit = {
        "flash_tpu": (
            functools.partial(flash_attention_tpu, generation=generation),
            COMPILED_HEADS // COMPILED_KV_HEADS * tiling_of(generation, 128).tile ** 2,
        ),
        "splash": (splash_attention, BLOCK_SIZES[0] ** 2),
    }[kernel]
    sharding = SingleDeviceSharding(device)

    def shape(*sizes, dtype="bfloat16"):
        return jax.ShapeDtypeStruct((1, length, *sizes), dtype, sharding=sharding)

    def run(q, k, v, segment_ids, dout):
        out, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, segment_ids, mask=Mask(), scale=0.1), q, k, v)
        return out, pull_back(dout)

    q, kv = shape(COMPILED_HEADS, 128), shape(COMPILED_KV_HEADS, 128)
    began = time.perf_counter()
    program = jax.jit(run).trace(q, kv, kv, shape(dtype="int32"), q).lower(lowering_platforms=("tpu",)).compile()
    return {
        "topology": topology,
        "kernel": kernel,
        "length": length,
        "visit": visit,
        "temp_mib": round(temporary_bytes(program) / 2**20, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }


SMALL_VISIT = 1000
"""Bundles of a region that does less than to visit a tile."""
PASS_NAMES = {"forward": r"flash_forward|splash_mha_fwd", "dq": r"flash_dq|splash_mha_dq", "dkv": r"_dkv"}


def with_bundles(topology: str, kernel: str, length: int) -> dict[str, Any]:
    """``compile_one`` in a process of its own, whose compiler writes down what it scheduled."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "benchmarks.attention", "--compile-one", topology, kernel, str(length)]
        environment = dumping_environment(directory)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{topology} {kernel} {length}: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        found["bundles"] = {}
        for file in dumped_files(directory):
            for name, pattern in PASS_NAMES.items():
                if re.search(pattern, file.name):
                    with file.open(errors="replace") as lines:
                        visits = innermost(read_regions(lines, SMALL_VISIT))
                    pairs = found["visit"] / 512**2
                    found["bundles"][name] = sorted(round(len(region) / pairs) for region in visits)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="timed runs of each kernel")
    parser.add_argument("--small", action="store_true", help="tiny sizes in float32, on whatever there is")
    parser.add_argument("--compile-only", action="store_true", help="compile for TPUs that are not here")
    parser.add_argument("--bundles", action="store_true", help="count what the TPU compiler schedules, at 4096 tokens")
    parser.add_argument("--plot", type=Path, help="draw the speeds into this file (needs matplotlib)")
    parser.add_argument("--compile-one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile_one:
        topology, kernel, length = arguments.compile_one
        print(json.dumps(compile_one(topology, kernel, int(length))))
        return
    if arguments.compile_only:
        jax.config.update("jax_platforms", "cpu")
        rows = []
        for topology in CHIPS.values():
            for kernel in ("flash_tpu", "splash"):
                for length in (4096, 32_768, 131_072):
                    compile_ = with_bundles if arguments.bundles and length == 4096 else compile_one
                    rows.append(compile_(topology, kernel, length))
                    print(rows[-1], file=sys.stderr, flush=True)
        result: dict[str, Any] = {"compiled": rows, "heads": COMPILED_HEADS, "kv_heads": COMPILED_KV_HEADS}
    else:
        if not arguments.small and jax.default_backend() == "cpu":
            parser.error("JAX finds no accelerator here; --small and --compile-only run anywhere")
        result = measure(small=arguments.small, rounds=arguments.rounds)
        if arguments.plot:
            draw(result["speeds"], result["device"], arguments.plot)
    print(json.dumps({"name": "attention", **result, "versions": versions(*PACKAGES)}))


if __name__ == "__main__":
    main()
