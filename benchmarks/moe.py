"""A layer of experts against a dense MLP with the same floating-point operations a token: value and all gradients.

    python benchmarks/moe.py

Measured on this machine's CPU in float32: 4096 tokens in 4 sequences, width 512, 8 experts of which a token goes
through 2, nothing dropped; the dense MLP is as wide as two experts. Both run in turn. The routing is that of random
parameters, as uneven as it comes. The last line is one JSON object: ``ratio`` is the median over the pairs of the dense
MLP's seconds by the experts' (so 1 / 1.3 = 0.77 is the least), ``load`` the largest share of an expert by the even one.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax.mesh import BATCH_AXES, single_device_mesh
from lmjax.nn.execution import LayerExecution
from lmjax.nn.mlp import MLP
from lmjax.nn.moe import MoE, MoEConfig
from lmjax.sharding import parameter_spec

SEQUENCES, LENGTH, WIDTH, HIDDEN = 4, 1024, 512, 1024
MOE = MoEConfig(num_experts=8, experts_per_token=2)
EXECUTION = LayerExecution(compute_dtype=jnp.dtype("float32"))


def placed(module: nnx.Module, mesh: Mesh) -> Any:
    """The module with every parameter where its axes say."""
    graphdef, variables = nnx.split(module)

    def place(variable: Any) -> jax.Array:
        value = variable.get_value()
        return jax.device_put(value, NamedSharding(mesh, parameter_spec(variable.axes, value.shape, mesh.shape)))

    leaves = jax.tree.map(place, variables, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return nnx.merge(graphdef, nnx.to_pure_dict(leaves))


def layers(mesh: Mesh) -> dict[str, Any]:
    common: dict[str, Any] = {"activation": "silu", "gated": True, "output_std": 0.02, "key": jax.random.key(0)}
    return {
        "dense": placed(MLP(WIDTH, MOE.experts_per_token * HIDDEN, bias=False, **common), mesh),
        "experts": placed(MoE(MOE, WIDTH, HIDDEN, **common), mesh),
    }


def forward(layer: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    if isinstance(layer, MLP):
        return layer(x, EXECUTION), None
    return layer(x, jnp.ones(x.shape[:2], bool, out_sharding=PartitionSpec(BATCH_AXES, None)), EXECUTION)


def value_and_gradients() -> Callable[..., Any]:
    def weighted(layer, x, weights):
        y, sums = forward(layer, x)
        return jnp.sum(y * weights), sums

    return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))


def measure(pairs: int, mesh: Mesh) -> dict[str, Any]:
    run, found = value_and_gradients(), layers(mesh)
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, None))
    both = jax.random.normal(jax.random.key(1), (2, SEQUENCES, LENGTH, WIDTH))
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
        "run": {"tokens": SEQUENCES * LENGTH, "width": WIDTH, "hidden": HIDDEN, "dtype": "float32"}
        | {"experts": MOE.num_experts, "choices": MOE.experts_per_token},
        "cpus": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
