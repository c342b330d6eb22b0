"""Llama-3-8B's train step compiled for 64 TPU v5p chips that are not here, and the memory it needs beside MaxText's.

    python benchmarks/compile_llama3_8b.py

One sequence of 8192 tokens a chip, fsdp 16 x tensor 4, bfloat16 compute, float32 parameters and moments, full
rematerialisation. Takes one to four minutes and 5 GiB on a CPU. The peer's figure is a record, not run here: MaxText
0.2.5 (PyPI), its train_compile with llama3.1-8b on v5p-128, the same mesh, batch, remat and precision, with
jax 0.12.0.1 and libtpu 0.0.51. It is told by the same field of the compiler's memory analysis.
"""

import importlib.metadata
import json
import platform
from pathlib import Path

import jax
import jax.numpy as jnp

from lmjax.config import load_model
from lmjax.mesh import AXES, MeshConfig
from lmjax.models.decoder import Execution
from lmjax.ops.cross_entropy import LossOptions
from lmjax.optim import OptimizerConfig
from lmjax.plan.compile import CompiledStep, compile_step, topology_mesh
from lmjax.plan.hlo import arrays_above
from lmjax.train.feed import abstract_batch
from lmjax.train.state import make_blueprint

TOPOLOGY = "v5p:4x4x4"
MESH = MeshConfig(fsdp=16, tensor=4)
LENGTH = 8192
ROWS = 64
"""Sequences of a global batch: one a chip."""
MODEL = load_model(str(Path(__file__).parent.parent / "configs" / "models" / "llama3_8b.yaml"))
MAXTEXT_TEMP_GIB = 7.00
GIB = 2**30


def compile_llama3_8b() -> CompiledStep:
    """With everything as the configs have it by default: full remat, attention by auto, chunks of 2048 tokens."""
    mesh = topology_mesh(MESH, TOPOLOGY)
    blueprint = make_blueprint(MODEL, OptimizerConfig(), 1000, mesh)
    execution = Execution(compute_dtype=jnp.dtype("bfloat16"), platform="tpu")
    return compile_step(blueprint, execution, LossOptions(), abstract_batch(ROWS, LENGTH, 1, mesh))


def quadratic_arrays(step: CompiledStep) -> list[str]:
    """Arrays with two dimensions of LENGTH or more: scores, or logits of whole sequences.

    No other array of a device is so large: embed is 4096, and its part of the MLP 3584 and of the vocabulary 32064.
    """
    return sorted(f"{found.dtype}{list(found.shape)}" for found in arrays_above(step.text, LENGTH, LENGTH))


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    step = compile_llama3_8b()
    temp_gib = step.temp_bytes / GIB
    result = {
        "name": "compile_llama3_8b",
        "ratio": round(MAXTEXT_TEMP_GIB / temp_gib, 3),
        "temp_gib": round(temp_gib, 3),
        "peer_temp_gib": MAXTEXT_TEMP_GIB,
        "peer": "MaxText 0.2.5, jax 0.12.0.1, libtpu 0.0.51",
        "argument_gib": round(step.argument_bytes / GIB, 3),
        "total_gib": round(step.total_bytes / GIB, 3),
        "quadratic_arrays": quadratic_arrays(step),
        "collectives": {kind: found._asdict() for kind, found in step.collectives.items()},
        "flops": step.flops,
        "seconds": round(step.seconds, 1),
        "model": "configs/models/llama3_8b.yaml",
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
