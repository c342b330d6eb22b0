"""Mixtral-8x7B's train step, compiled for 128 chips of a v5p pod that is not here, its experts over 8 of them.

    python benchmarks/compile_moe.py

One sequence of 4096 tokens a chip, fsdp 16 x expert 8, nothing dropped, bfloat16 compute, float32 parameters and
moments, full remat. Needs libtpu and 5 GiB of memory; some minutes. The last line is one JSON object: what a chip holds
and sends, and the arrays that would grow with experts x tokens, of which there may be none.
"""

import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp

from lmjax.config import load_model
from lmjax.mesh import AXES, MeshConfig
from lmjax.models.decoder import Execution
from lmjax.ops.cross_entropy import LossOptions
from lmjax.optim import OptimizerConfig
from lmjax.plan.compile import CompiledStep, compile_step, topology_mesh
from lmjax.plan.hlo import array_shapes
from lmjax.train.feed import abstract_batch
from lmjax.train.state import make_blueprint

TOPOLOGY = "v5p:4x4x8"
MESH = MeshConfig(fsdp=16, expert=8)
LENGTH = 4096
ROWS = 128
"""Sequences of a global batch: one a chip."""
MODEL = load_model(str(Path(__file__).parent.parent / "configs" / "models" / "mixtral_8x7b.yaml"))
CHIP_GIB = 95
"""Memory of a v5p chip."""
GIB = 2**30


def compile_mixtral() -> CompiledStep:
    mesh = topology_mesh(MESH, TOPOLOGY)
    blueprint = make_blueprint(MODEL, OptimizerConfig(), 1000, mesh)
    execution = Execution(compute_dtype=jnp.dtype("bfloat16"), platform="tpu")
    return compile_step(blueprint, execution, LossOptions(), abstract_batch(ROWS, LENGTH, 1, mesh))


def arrays_too_large(step: CompiledStep) -> list[str]:
    """Arrays larger than both the hidden layer of all tokens that a chip's expert may get and the inputs of all blocks.

    A one-hot dispatch has tokens x experts x capacity; a product with every expert has experts x tokens x width.
    """
    hidden = LENGTH * MESH.expert * MODEL.mlp_dim
    inputs = MODEL.num_layers * LENGTH * MODEL.embed_dim
    found = [shape for shape in array_shapes(step.text) if math.prod(shape.shape) > max(hidden, inputs)]
    return sorted(f"{shape.dtype}{list(shape.shape)}" for shape in found)


def main() -> None:
    step = compile_mixtral()
    result = {
        "name": "compile_moe",
        "ratio": round(CHIP_GIB / (step.total_bytes / GIB), 3),
        "temp_gib": round(step.temp_bytes / GIB, 3),
        "argument_gib": round(step.argument_bytes / GIB, 3),
        "total_gib": round(step.total_bytes / GIB, 3),
        "chip_gib": CHIP_GIB,
        "arrays_too_large": arrays_too_large(step),
        "collectives": {kind: found._asdict() for kind, found in step.collectives.items()},
        "flops": step.flops,
        "seconds": round(step.seconds, 1),
        "model": "configs/models/mixtral_8x7b.yaml",
        "topology": TOPOLOGY,
        "mesh": {axis: getattr(MESH, axis) for axis in AXES},
        "rows": ROWS,
        "length": LENGTH,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "libtpu")},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
