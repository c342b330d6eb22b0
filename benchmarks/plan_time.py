"""The planner's predicted seconds of a step beside measured ones, on this machine's CPUs as 8 devices.

    python benchmarks/plan_time.py --count 20

What a device computes, moves and copies in a second is measured first: a matrix product, a sum of two arrays. Steps are
drawn over six small models, meshes, remat policies, micro-batches and lengths; each is compiled and run, and the
median of a few runs stands beside the prediction. The last line is one JSON object: ``spearman`` is the rank
correlation of the two over all cases, ``spearman_of_one_model`` over as many ways to carry out one step of one model,
as a search has them.
"""

import argparse
import dataclasses
import itertools
import json
import platform as python_platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.plan_accuracy import MODELS, POLICIES, Case
from lmjax.errors import InputError
from lmjax.mesh import AXES
from lmjax.plan.cost import Rates, bound_at, cost
from lmjax.plan.plan import make_setup
from lmjax.plan.topology import parse_topology
from lmjax.train.feed import abstract_batch
from lmjax.train.job import Job, lower_program, make_program
from lmjax.train.state import init_state

DEVICES = 8
RUNS = 3


def small(name: str) -> Any:
    """A model of the accuracy's table with an eighth of its width, four layers and 8192 tokens of vocabulary."""
    model = MODELS[name]
    width = model.embed_dim // 8 // model.num_heads // 2 * 2 * model.num_heads
    changes: dict[str, Any] = {"vocab_size": 8192, "num_layers": 4, "embed_dim": width, "head_dim": None}
    if model.sliding_window is not None:
        changes["sliding_window"] = 128
    return dataclasses.replace(model, mlp_dim=model.mlp_dim // 64 * 8, **changes)


def drawn(seed: int, *, model: str | None = None) -> Iterator[tuple[Case, Job]]:
    """Steps without end, no two alike; with ``model`` all are of its 32 rows of 256 tokens."""
    draw, seen = random.Random(f"times {seed}"), set()
    while True:
        name = model or draw.choice(list(MODELS))
        sizes: dict[str, int] = dict.fromkeys(AXES, 1)
        for _ in range(3):
            sizes[draw.choice([axis for axis in AXES if axis != "expert" or name == "experts"])] *= 2
        accumulation = draw.choice((1, 1, 2, 4))
        shards = sizes["data"] * sizes["fsdp"] * sizes["expert"]
        case = Case(
            model=name,
            topology=f"cpu:{DEVICES}",
            data=sizes["data"],
            fsdp=sizes["fsdp"],
            expert=sizes["expert"],
            tensor=sizes["tensor"],
            rows=32 if model else shards * accumulation * draw.choice((1, 2)),
            length=256 if model else draw.choice((128, 256, 512)),
            policy=draw.choice(list(POLICIES)),
            accumulation=accumulation,
            compute="float32",
        )
        job = dataclasses.replace(case.job, model=small(name))
        try:
            make_setup(job, parse_topology(case.topology))
        except InputError:
            continue
        if case not in seen:
            seen.add(case)
            yield case, job


def median_seconds(call: Callable[[], Any]) -> float:
    jax.block_until_ready(call())
    times = []
    for _ in range(RUNS):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def rates_here() -> Rates:
    """Of one of the devices while all of them work: they share the cores."""
    n = 1536
    square, row = jnp.ones((n, n)), jnp.ones(2**25)
    product, total = jax.jit(lambda a: a @ a), jax.jit(lambda a: a + a)
    flops = 2 * n**3 / median_seconds(lambda: product(square))
    memory = 2 * row.nbytes / median_seconds(lambda: total(row))
    return Rates(flops / DEVICES, *[memory / DEVICES] * 4)


def measured(job: Job) -> float:
    """Seconds of a step, the median of a few."""
    program = make_program(job)
    compiled = lower_program(job, program).compile()
    batch = abstract_batch(job.train.global_batch_size, job.data.sequence_length, job.train.accumulation, program.mesh)
    draw = np.random.default_rng(0)
    high = {"tokens": job.model.vocab_size, "targets": job.model.vocab_size, "positions": 1}

    def filled(name: str, leaf: Any) -> jax.Array:
        values = draw.integers(0, high[name], leaf.shape) if name in high else np.ones(leaf.shape)
        if name == "positions":
            values = np.broadcast_to(np.arange(leaf.shape[-1]), leaf.shape)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    filled_batch = type(batch)(**{name: filled(name, leaf) for name, leaf in batch._asdict().items()})
    state = init_state(program.blueprint, 0)

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, filled_batch)
        return metrics

    return median_seconds(step)


def predicted(job: Job, rates: Rates) -> float:
    topology = parse_topology(f"cpu:{DEVICES}")
    return bound_at(cost(make_setup(job, topology), job.mesh, topology), rates).predicted


def spearman(a: list[float], b: list[float]) -> float:
    """Correlation of ranks; no two values are alike here."""
    ranks = np.stack([np.argsort(np.argsort(values)) for values in (a, b)])
    return float(np.asarray(np.corrcoef(ranks))[0, 1])


def compared(cases: Iterator[tuple[Case, Job]], count: int, rates: Rates) -> float:
    pairs = []
    for case, job in itertools.islice(cases, count):
        pairs.append((predicted(job, rates), measured(job)))
        mesh = " ".join(f"{axis}{getattr(case, axis)}" for axis in AXES if getattr(case, axis) > 1)
        batch = f"{case.rows:3} x {case.length:4} / {case.accumulation}"
        print(f"{pairs[-1][0]:7.3f} {pairs[-1][1]:7.3f}  {case.model:9} {mesh:22} {batch} {case.policy}", flush=True)
    return round(spearman(*map(list, zip(*pairs, strict=True))), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    rates = rates_here()
    print(f"{rates.flops * DEVICES / 1e9:.1f} GFLOP/s, {rates.memory * DEVICES / 1e9:.1f} GB/s, of all devices")
    print("predicted and measured seconds")
    found = {
        "name": "plan_time",
        "cases": arguments.count,
        "seed": arguments.seed,
        "spearman": compared(drawn(arguments.seed), arguments.count, rates),
        "spearman_of_one_model": compared(drawn(arguments.seed, model="grouped"), arguments.count, rates),
        "jax": jax.__version__,
        "python": python_platform.python_version(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
