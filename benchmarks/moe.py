"""A layer of experts against a dense MLP with the same floating-point operations a token: value and all gradients.

    python benchmarks/moe.py

Measured on this machine's CPU in float32: 4096 tokens in 4 sequences, width 512, 8 experts of which a token goes
through 2, nothing dropped; the dense MLP is as wide as two experts. Both run in turn. The routing is that of random
parameters, as uneven as it comes. Then both are compiled in bfloat16 for one TPU v5p chip that is not here, with
Mixtral-8x7B's sizes and 16384 tokens, where the compiler tells the seconds that operations and bytes would take at
best (null with a compiler that does not know them, as that of jax 0.10). Needs libtpu. The last line is one JSON
object: ``ratio`` is the median over the pairs of the dense MLP's seconds by the experts' (so 1 / 1.3 = 0.77 is the
least), ``compiled_seconds_ratio`` the same of the compiler's, and ``load`` the largest share of an expert by the even
one.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax.compat import temporary_bytes
from lmjax.hardware import Hardware
from lmjax.mesh import BATCH_AXES, single_device_mesh
from lmjax.nn.execution import LayerExecution
from lmjax.nn.mlp import MLP
from lmjax.nn.moe import MoE, MoEConfig
from lmjax.plan.topology import topology_devices
from lmjax.sharding import parameter_spec

MOE = MoEConfig(num_experts=8, experts_per_token=2)


class Sizes(NamedTuple):
    """Of a comparison."""

    sequences: int
    length: int
    width: int
    hidden: int
    """Of an expert."""


MEASURED = Sizes(4, 1024, 512, 1024)
COMPILED = Sizes(4, 4096, 4096, 14336)
TOPOLOGY = "v5p:2x2x1"
CPU = LayerExecution(compute_dtype=jnp.dtype("float32"))
TPU = LayerExecution(compute_dtype=jnp.dtype("bfloat16"), hardware=Hardware("tpu", "v5p"))


def layers(sizes: Sizes) -> dict[str, Callable[[], Any]]:
    """What makes each of the two."""
    common: dict[str, Any] = {"activation": "silu", "gated": True, "output_std": 0.02, "key": jax.random.key(0)}
    return {
        "dense": lambda: MLP(sizes.width, MOE.experts_per_token * sizes.hidden, bias=False, **common),
        "experts": lambda: MoE(MOE, sizes.width, sizes.hidden, **common),
    }


def on_mesh(module: nnx.Module, mesh: Mesh, place: Callable[[Any, NamedSharding], Any]) -> Any:
    """The module with ``place(value, sharding)`` for every parameter, where its axes say."""
    graphdef, variables = nnx.split(module)

    def placed(variable: Any) -> Any:
        value = variable.get_value()
        return place(value, NamedSharding(mesh, parameter_spec(variable.axes, value.shape, mesh.shape)))

    leaves = jax.tree.map(placed, variables, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return nnx.merge(graphdef, nnx.to_pure_dict(leaves))


def value_and_gradients(execution: LayerExecution) -> Callable[..., Any]:
    """Of a layer, its input and weights of its output."""

    def weighted(layer, x, weights):
        if isinstance(layer, MLP):
            y, sums = layer(x, execution), None
        else:
            valid = jnp.ones(x.shape[:2], bool, out_sharding=PartitionSpec(BATCH_AXES, None))
            y, sums = layer(x, valid, execution)
        return jnp.sum(y * weights), sums

    return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))


def compiled() -> dict[str, Any]:
    """The seconds at best, and temporary bytes, of both on a chip that is not here."""
    mesh = single_device_mesh(topology_devices(TOPOLOGY)[0])
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, None))
    shape = (COMPILED.sequences, COMPILED.length, COMPILED.width)
    x = jax.ShapeDtypeStruct(shape, TPU.compute_dtype, sharding=sharding)
    modules = {name: jax.eval_shape(make) for name, make in layers(COMPILED).items()}
    figures = {}
    with jax.set_mesh(mesh):
        for name, module in modules.items():
            layer = on_mesh(module, mesh, lambda like, at: like.update(sharding=at))
            step = value_and_gradients(TPU).trace(layer, x, x).lower(lowering_platforms=("tpu",)).compile()
            cost = step.cost_analysis()
            assert cost is not None
            figures[name] = {
                "seconds": round(cost["optimal_seconds"], 5),
                "flops": cost["flops"],
                "temp_bytes": temporary_bytes(step),
            }
    dense, experts = figures["dense"], figures["experts"]
    # Of ragged products older compilers count every matrix for every row, and their seconds mean nothing.
    is_known = abs(experts["flops"] / dense["flops"] - 1) < 0.01
    ratio = round(dense["seconds"] / experts["seconds"], 4) if is_known else None
    return {"compiled_seconds_ratio": ratio, "compiled": figures}


def measure(pairs: int, mesh: Mesh) -> dict[str, Any]:
    run = value_and_gradients(CPU)
    found = {name: on_mesh(make(), mesh, jax.device_put) for name, make in layers(MEASURED).items()}
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, None))
    both = jax.random.normal(jax.random.key(1), (2, MEASURED.sequences, MEASURED.length, MEASURED.width))
    x, weights = jax.device_put(tuple(both), sharding)
    (_, sums), _ = run(found["experts"], x, weights)
    jax.block_until_ready(run(found["dense"], x, weights))  # the first run of each, which is not timed
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for number in range(pairs):
        for name in sorted(found, reverse=number % 2 == 1):
            began = time.perf_counter()
            jax.block_until_ready(run(found[name], x, weights))
            seconds[name].append(time.perf_counter() - began)
        print(", ".join(f"{name} {times[-1]:.3f} s" for name, times in seconds.items()), flush=True)
    ratios = [dense / experts for dense, experts in zip(seconds["dense"], seconds["experts"], strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "seconds": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
        "load": round(float(jnp.max(sums.load) / jnp.mean(sums.load)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9, help="timed runs of each")
    pairs = parser.parse_args().pairs
    mesh = single_device_mesh()
    with jax.set_mesh(mesh):
        figures = measure(pairs, mesh)
    result = {
        "name": "moe",
        **figures,
        **compiled(),
        "run": {"measured": MEASURED._asdict(), "compiled": {**COMPILED._asdict(), "topology": TOPOLOGY}}
        | {"experts": MOE.num_experts, "choices": MOE.experts_per_token},
        "cpus": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
