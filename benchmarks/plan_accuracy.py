"""The planner's estimate of a step's memory beside what XLA's compilers say, for steps on devices that are not here.

    python benchmarks/plan_accuracy.py --platform tpu --seed 0 --count 20 >> benchmarks/results/plan_accuracy.jsonl
    python benchmarks/plan_accuracy.py --table benchmarks/results/plan_accuracy.jsonl

A case is drawn: one of seven models (dense, grouped heads, experts, tied tables, windows, ALiBi, latent attention), a
topology, a mesh that divides both, rows, length, remat policy, micro-batches and kernel. Its step is compiled; a row
has both figures, bytes of one device, and the estimate's error, relative to the compiler's: arguments + outputs +
temporaries - aliases. ``--cases`` prints what would be compiled. Needs libtpu, or for GPUs JAX's CUDA plugin. With
``--table`` the cases of a file are estimated again, beside the figures that the compilers gave then: it needs neither.

The last line is one JSON object: of the rows of this run, or of the file of ``--table``.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import platform as python_platform
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from lmjax.checkpoint.save import CheckpointConfig
from lmjax.data.config import DataConfig, StdlibSource
from lmjax.data.tokenizer import BytesTokenizer
from lmjax.errors import InputError
from lmjax.mesh import AXES, MeshConfig
from lmjax.models.config import DecoderConfig
from lmjax.nn.attention_latent import LatentConfig
from lmjax.nn.moe import MoEConfig
from lmjax.optim import OptimizerConfig
from lmjax.plan import search
from lmjax.plan.plan import make_plan
from lmjax.plan.topology import parse_topology
from lmjax.precision import PrecisionConfig
from lmjax.train.config import EvaluateConfig, LoggingConfig, TrainConfig
from lmjax.train.job import Job

MODELS = {
    "dense": DecoderConfig(
        vocab_size=50_304,
        max_length=8192,
        embed_dim=1536,
        num_layers=16,
        num_heads=12,
        mlp_dim=6144,
        mlp_gated=False,
        activation="gelu",
        norm="layer",
        norm_bias=True,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        position="learned",
    ),
    "grouped": DecoderConfig(
        vocab_size=32_000,
        max_length=8192,
        embed_dim=2048,
        num_layers=16,
        num_heads=16,
        num_kv_heads=8,
        mlp_dim=7168,
    ),
    "experts": DecoderConfig(
        vocab_size=32_000,
        max_length=8192,
        embed_dim=1024,
        num_layers=12,
        num_heads=16,
        num_kv_heads=8,
        mlp_dim=2816,
        moe=MoEConfig(num_experts=8, experts_per_token=2),
    ),
    "tied": DecoderConfig(
        vocab_size=128_256,
        max_length=8192,
        embed_dim=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=8192,
        tie_embeddings=True,
    ),
    "windowed": DecoderConfig(
        vocab_size=64_000,
        max_length=8192,
        embed_dim=1536,
        num_layers=16,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        mlp_dim=8192,
        layer_pattern=("sliding", "full"),
        sliding_window=1024,
        attention_softcap=50.0,
        logit_softcap=30.0,
        norm_placement="sandwich",
        activation="gelu_tanh",
        tie_embeddings=True,
    ),
    "alibi": DecoderConfig(
        vocab_size=50_304,
        max_length=8192,
        embed_dim=2048,
        num_layers=12,
        num_heads=16,
        mlp_dim=8192,
        mlp_gated=False,
        activation="gelu",
        norm="layer",
        position="alibi",
        tie_embeddings=True,
    ),
    "latent": DecoderConfig(
        vocab_size=32_000,
        max_length=8192,
        embed_dim=2048,
        num_layers=12,
        num_heads=16,
        head_dim=192,
        latent=LatentConfig(kv_rank=512, query_rank=768, rope_dim=64, value_dim=128),
        mlp_dim=5632,
    ),
}
"""Of 0.3 to 1.3 billion parameters: the arrays of a step are as large as in real training, and compile as quickly as
small ones."""

TOPOLOGIES = {"cpu": ("cpu:8",), "tpu": ("v5e:2x4", "v5p:2x2x2", "v6e:2x4"), "gpu": ("h200:8",)}
KERNELS = {"cpu": ("auto",), "tpu": ("auto", "flash_tpu"), "gpu": ("auto", "flash_hopper")}
LENGTHS = {"cpu": (2048, 4096, 8192), "tpu": (2048, 4096, 8192), "gpu": (1024, 2048, 4096, 8192)}
"""On a GPU all scores of a row exist at once up to 1024 tokens, if no other kernel is asked for."""
_NONE, _DOTS, _HEADS, _ATTENTION, _FULL = search.POLICIES
POLICIES = {"none": _NONE, "full": _FULL, "attention": _ATTENTION, "dots": _DOTS, "heads": _HEADS}
GOAL = {"mean": 0.06, "worst": 0.12}
"""The largest relative errors that are taken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A step, and what it is compiled for."""

    model: str
    topology: str
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    rows: int
    """Of a global batch."""
    length: int
    policy: str
    accumulation: int = 1
    kernel: str = "auto"
    compute: str = "bfloat16"
    moments_on_host: bool = False

    @property
    def job(self) -> Job:
        return Job(
            run_dir="unused",
            model=MODELS[self.model],
            tokenizer=BytesTokenizer(kind="bytes"),
            data=DataConfig(path="unused", sources=(StdlibSource(kind="stdlib"),), sequence_length=self.length),
            mesh=MeshConfig(data=self.data, fsdp=self.fsdp, expert=self.expert, tensor=self.tensor),
            precision=PrecisionConfig(compute=self.compute),  # pyright: ignore[reportArgumentType]
            optimizer=OptimizerConfig(),
            train=TrainConfig(
                steps=1000,
                global_batch_size=self.rows,
                accumulation=self.accumulation,
                remat=POLICIES[self.policy],
                moments_on_host=self.moments_on_host,
                attention_kernel=self.kernel,  # pyright: ignore[reportArgumentType]
            ),
            checkpoint=CheckpointConfig(),
            evaluate=EvaluateConfig(),
            logging=LoggingConfig(),
            resolved={},
        )


def drawn(platform: str, seed: int | str) -> Iterator[Case]:
    """Cases without end, no two alike, that are not refused and fit their devices by the estimate."""
    draw, seen = random.Random(f"{platform} {seed}"), set()
    while True:
        model = draw.choice(list(MODELS))
        axes = [axis for axis in AXES if axis != "expert" or model == "experts"]
        sizes: dict[str, int] = dict.fromkeys(AXES, 1)
        for _ in range(3):
            sizes[draw.choice(axes)] *= 2
        accumulation = draw.choice((1, 1, 2, 4))
        shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
        case = Case(
            model=model,
            topology=draw.choice(TOPOLOGIES[platform]),
            **sizes,  # pyright: ignore[reportArgumentType]
            rows=shards * accumulation * draw.choice((1, 2, 4)),
            length=draw.choice(LENGTHS[platform]),
            policy=draw.choice(list(POLICIES)),
            accumulation=accumulation,
            kernel=draw.choice(KERNELS[platform]),
            compute="float32" if platform == "cpu" else "bfloat16",
        )
        try:
            plan = make_plan(case.job, case.topology)
        except InputError:
            continue  # a kernel that cannot, or a mesh that does not divide
        if case not in seen and plan.fits is not False:
            seen.add(case)
            yield case


def row(case: Case) -> dict[str, Any]:
    """Both figures of a case. Raises InputError where the compiler refuses what should fit."""
    plan = make_plan(case.job, case.topology, compiles=True)
    assert plan.compiled is not None
    return {
        **dataclasses.asdict(case),
        **judged(case, plan.compiled.total_bytes),
        "seconds": round(plan.compiled.seconds, 1),
        "versions": versions(case.topology),
    }


def judged(case: Case, compiled_bytes: int) -> dict[str, Any]:
    """The estimate of a case beside what a compiler said."""
    peak = make_plan(case.job, case.topology).peak
    return {
        "compiled_bytes": compiled_bytes,
        "estimate_bytes": peak.bytes,
        "error": round(peak.bytes / compiled_bytes - 1, 4),
        "peak": peak.name,
    }


def recorded(file: Path) -> list[dict[str, Any]]:
    """The rows of a file with the estimates of today."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [{**found, **judged(case_in(found), found["compiled_bytes"])} for found in rows]


def case_in(found: dict[str, Any]) -> Case:
    """The case of a row; what it says nothing of is as it is by default."""
    return Case(**{field.name: found[field.name] for field in dataclasses.fields(Case) if field.name in found})


def versions(topology: str) -> dict[str, str]:
    compiler = {"cpu": (), "gpu": ("jax-cuda13-plugin",), "tpu": ("libtpu",)}[
        parse_topology(topology).hardware.platform
    ]
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", *compiler)}
    return {"python": python_platform.python_version(), **found}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The errors of rows: of all, and the largest with their cases."""
    errors = [abs(found["error"]) for found in rows]
    worst = sorted(rows, key=lambda found: -abs(found["error"]))[:5]
    names = ("model", "topology", "policy", "accumulation", "kernel", "error")
    return {
        "name": "plan_accuracy",
        "cases": len(rows),
        "mean_error": round(statistics.mean(errors), 4),
        "worst_error": round(max(errors), 4),
        "below_by_at_most": round(max(-found["error"] for found in rows), 4),
        "worst": [{name: found[name] for name in names} for found in worst],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=TOPOLOGIES, default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--cases", action="store_true", help="print the cases, and compile nothing")
    parser.add_argument("--table", type=Path, help="a file of rows to sum up, and compile nothing")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    if arguments.table is not None:
        rows = recorded(arguments.table)
        for found in sorted(rows, key=lambda found: -abs(found["error"])):
            mesh = " ".join(f"{axis}{found[axis]}" for axis in AXES if found[axis] > 1)
            sizes = f"{found['compiled_bytes'] / 2**30:6.2f} {found['estimate_bytes'] / 2**30:6.2f}"
            batch = f"{found['rows']:3} x {found['length']} / {found['accumulation']}"
            where = f"{found['model']:9} {found['topology']:10} {mesh:22}"
            print(f"{100 * found['error']:+6.1f}% {sizes}  {where} {batch} {found['policy']:10} {found['kernel']}")
        began = time.perf_counter()  # again, now that the parameters of each model are known
        recorded(arguments.table)
        milliseconds = 1000 * (time.perf_counter() - began) / len(rows)
        print(json.dumps({**summary(rows), "milliseconds_an_estimate": round(milliseconds, 2)}))
        return
    cases, rows = drawn(arguments.platform, arguments.seed), []
    for _ in range(arguments.count):
        case = next(cases)
        if arguments.cases:
            print(case, file=sys.stderr)
            continue
        try:
            rows.append(row(case))
        except InputError as error:  # said to fit, and does not
            print(json.dumps({**dataclasses.asdict(case), "refused": str(error)}), flush=True)
            continue
        print(json.dumps({**rows[-1], "seed": arguments.seed}), flush=True)
    if rows:
        print(json.dumps(summary(rows)))


if __name__ == "__main__":
    main()
