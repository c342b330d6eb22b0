"""The chunked loss against the naive form, which has all logits at once: value and both gradients.

    python benchmarks/loss.py

Measured on this machine's CPU in float32, 2048 tokens x 32768 words x width 512, both forms in turn; then compiled for
a TPU v5p chip that is not here, 16384 tokens x 131072 words x width 4096 in bfloat16, where the compiler tells each
one's temporary bytes and estimates the cycles of every instruction (those of the loop's body times its trips). Needs
libtpu and 5 GiB of memory; three minutes. The last line is one JSON object: ``ratio`` is the median over the pairs of
the naive form's seconds by the chunked form's, ``compiled_seconds_ratio`` the same of the estimates, and
``temp_bytes_ratio`` the chunked form's temporary bytes by the naive form's.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from lmjax.compat import temporary_bytes
from lmjax.mesh import BATCH_AXES, FSDP_AXES, single_device_mesh
from lmjax.ops.cross_entropy import LossOptions, linear_cross_entropy, naive_cross_entropy
from lmjax.plan.hlo import instructions
from lmjax.plan.topology import topology_devices

MEASURED = {"tokens": 2048, "vocabulary": 32768, "width": 512}
COMPILED = {"tokens": 16384, "vocabulary": 131072, "width": 4096}
ROWS = 2
"""Sequences that the tokens come in."""
TOPOLOGY = "v5p:2x2x1"
FORMS: dict[str, Callable[..., Any]] = {"chunked": linear_cross_entropy, "naive": naive_cross_entropy}


def arguments(sizes: dict[str, int], dtype: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Residual stream, table, targets and weights, without values."""
    batch = (ROWS, sizes["tokens"] // ROWS)
    return (
        jax.ShapeDtypeStruct((*batch, sizes["width"]), dtype),
        jax.ShapeDtypeStruct((sizes["vocabulary"], sizes["width"]), jnp.float32),
        jax.ShapeDtypeStruct(batch, jnp.int32),
        jax.ShapeDtypeStruct(batch, jnp.float32),
    )


def mean_and_gradients(form: str, vocabulary: int) -> Callable[..., Any]:
    """The mean loss, and its gradients with respect to the residual stream and the table."""

    def mean(x, table, targets, weights):
        sums = FORMS[form](x, table, targets, weights, LossOptions(), vocab_size=vocabulary)
        return sums.loss / sums.weight

    return jax.value_and_grad(mean, (0, 1))


def compiled(form: str, sizes: dict[str, int], dtype: Any, device: Any) -> jax.stages.Compiled:
    """For one device: the chunked form knows the mesh of one, the naive form none."""
    shapes, platform_name = arguments(sizes, dtype), device.platform
    if form == "chunked":
        mesh = single_device_mesh(device)
        specs = (P(BATCH_AXES, None, None), P("tensor", FSDP_AXES), P(BATCH_AXES, None), P(BATCH_AXES, None))
        shardings: Any = [NamedSharding(mesh, spec) for spec in specs]
        context: Any = jax.set_mesh(mesh)
    else:
        shardings, context = [SingleDeviceSharding(device)] * len(shapes), contextlib.nullcontext()
    placed = [
        jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
        for shape, sharding in zip(shapes, shardings, strict=True)
    ]
    with context:
        step = jax.jit(mean_and_gradients(form, sizes["vocabulary"]))
        return step.trace(*placed).lower(lowering_platforms=(platform_name,)).compile()


def estimated_cycles(text: str, trips: int) -> int:
    """The sum of the TPU compiler's estimates, with the body of the program's one loop counted ``trips`` times."""
    found = list(instructions(text))
    bodies = {match[1] for one in found if (match := re.search(r"body=%([\w.\-]+)", one.arguments))}
    assert len(bodies) <= 1, bodies
    total = 0
    for one in found:
        cycles = re.search(r'"estimated_cycles":"(\d+)"', one.arguments)
        total += int(cycles[1]) * (trips if one.computation in bodies else 1) if cycles else 0
    assert total, "this compiler tells no estimates"
    return total


def compile_both() -> dict[str, Any]:
    """Estimated cycles and temporary bytes of both forms on a v5p chip."""
    device = topology_devices(TOPOLOGY)[0]
    figures: dict[str, dict[str, int]] = {}
    for form in FORMS:
        step = compiled(form, COMPILED, jnp.bfloat16, device)
        temporaries, text = temporary_bytes(step), step.as_text()
        assert text is not None
        cycles = estimated_cycles(text, -(-COMPILED["tokens"] // LossOptions().chunk_tokens))
        figures[form] = {"cycles": cycles, "temp_bytes": temporaries}
        print(f"{form}: {cycles / 1e6:.1f} M cycles, {temporaries / 2**30:.3f} GiB", flush=True)
    return {
        "compiled_seconds_ratio": round(figures["naive"]["cycles"] / figures["chunked"]["cycles"], 4),
        "temp_bytes_ratio": round(figures["chunked"]["temp_bytes"] / figures["naive"]["temp_bytes"], 4),
        "compiled": figures,
    }


def measure_both(pairs: int) -> dict[str, Any]:
    """Seconds of both forms on this CPU, in turn."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, table, targets, weights = arguments(MEASURED, jnp.float32)
    values = (
        jax.random.normal(keys[0], x.shape),
        0.02 * jax.random.normal(keys[1], table.shape),
        jax.random.randint(keys[2], targets.shape, 0, MEASURED["vocabulary"]),
        jnp.ones(weights.shape),
    )
    device = jax.local_devices()[0]
    steps = {form: compiled(form, MEASURED, jnp.float32, device) for form in FORMS}
    placed = {
        form: [jax.device_put(value, at) for value, at in zip(values, step.input_shardings[0], strict=True)]
        for form, step in steps.items()
    }
    losses = {
        form: float(step(*placed[form])[0]) for form, step in steps.items()
    }  # their first run, which is not timed
    assert abs(losses["chunked"] / losses["naive"] - 1) < 1e-5, losses
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for number in range(pairs):
        for form in sorted(FORMS, reverse=number % 2 == 1):
            began = time.perf_counter()
            jax.block_until_ready(steps[form](*placed[form]))
            seconds[form].append(time.perf_counter() - began)
    ratios = [naive / chunked for naive, chunked in zip(seconds["naive"], seconds["chunked"], strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "seconds": {form: round(statistics.median(times), 4) for form, times in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="timed runs of each form")
    pairs = parser.parse_args().pairs
    figures = measure_both(pairs)
    print(f"CPU seconds: {figures['seconds']}", flush=True)
    result = {
        "name": "loss",
        **figures,
        **compile_both(),
        "run": {"measured": MEASURED | {"dtype": "float32"}, "compiled": COMPILED | {"topology": TOPOLOGY}},
        "chunk_tokens": LossOptions().chunk_tokens,
        "cpus": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
