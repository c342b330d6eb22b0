"""Train steps of published models, compiled for chips that are not here: what a chip holds and sends.

    python benchmarks/compile_steps.py llama3_8b

One sequence a chip (of DeepSeek-V3 one for the eight chips along ``tensor``), bfloat16 compute, float32 parameters and
moments, full rematerialisation, all else as the configs have it by default; experts drop nothing. Needs libtpu, or for
GPUs JAX's CUDA plugin; each takes some minutes and 5 GiB on a CPU.

The last line is one JSON object. ``too_large`` are arrays of a kind that may not be there. Llama-3-8B has a peer whose
figure is a record, not run here: MaxText 0.2.5 (PyPI), its train_compile with llama3.1-8b on v5p-128, the same mesh,
batch, remat and precision, with jax 0.12.0.1 and libtpu 0.0.51, told by the same field of the compiler's memory
analysis; ``ratio`` is its temporaries by ours.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lmjax.config import load_model
from lmjax.hardware import hardware
from lmjax.mesh import AXES, MeshConfig
from lmjax.models.config import DecoderConfig
from lmjax.models.decoder import Execution
from lmjax.ops.cross_entropy import LossOptions
from lmjax.optim import OptimizerConfig
from lmjax.plan.compile import CompiledStep, compile_step, topology_mesh
from lmjax.plan.hlo import ArrayShape, array_shapes, arrays_above
from lmjax.plan.topology import parse_topology
from lmjax.train.feed import abstract_batch
from lmjax.train.state import make_blueprint

MODELS = Path(__file__).parent.parent / "configs" / "models"
GIB = 2**30


def quadratic_arrays(case: "Case", text: str) -> set[ArrayShape]:
    """With two dimensions of the length or more: scores, or logits of whole sequences.

    No other array of a device is so large: Llama-3-8B's width is 4096, a device's part of its MLP 3584 and of its
    vocabulary 32064.
    """
    return arrays_above(text, case.length, case.length)


def score_arrays(case: "Case", text: str) -> set[ArrayShape]:
    """Of heads and twice the length, which no width of these models is. The optimizer has parameters as squares."""
    return {found for found in array_shapes(text) if len(found.shape) > 2 and found.shape.count(case.length) > 1}


def arrays_by_experts_and_tokens(case: "Case", text: str) -> set[ArrayShape]:
    """Larger than the rows of all tokens that the experts of a chip may get, the inputs of all blocks, and a parameter.

    A one-hot dispatch has tokens x experts x capacity; a product with every expert has experts x tokens x width.
    """
    model, mesh = case.model, case.mesh
    assert model.moe is not None
    here = model.moe.num_experts // mesh.expert
    rows = case.length * mesh.expert * min(model.moe.experts_per_token, here)
    rows *= max(model.embed_dim, model.expert_dim // mesh.tensor)
    inputs = case.length * model.embed_dim * model.num_layers
    parameter = model.num_layers * here * model.embed_dim * model.expert_dim // (mesh.fsdp * mesh.tensor)
    return {found for found in array_shapes(text) if math.prod(found.shape) > max(rows, inputs, parameter)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and the chips that it is compiled for."""

    name: str
    topology: str
    mesh: MeshConfig
    rows: int
    """Sequences of a global batch."""
    length: int
    chip_gib: float
    """Memory of a chip."""
    too_large: Callable[["Case", str], set[ArrayShape]]
    """The arrays of a program that may not be there."""
    peer_temp_gib: float | None = None
    config: str | None = None
    """Its file in configs/models, where that has another name."""

    @property
    def platform(self) -> str:
        return parse_topology(self.topology).hardware.platform

    @property
    def model(self) -> DecoderConfig:
        model = load_model(str(MODELS / f"{self.config or self.name}.yaml"))
        return dataclasses.replace(model, max_length=max(model.max_length, self.length))


CASES = {
    case.name: case
    for case in (
        Case(
            name="llama3_8b",
            topology="v5p:4x4x4",
            mesh=MeshConfig(fsdp=16, tensor=4),
            rows=64,
            length=8192,
            chip_gib=95,
            too_large=quadratic_arrays,
            peer_temp_gib=7.00,
        ),
        *(
            Case(
                name=name,
                topology="v5p:4x4x4",
                mesh=MeshConfig(fsdp=16, tensor=4),
                rows=64,
                length=8192,
                chip_gib=95,
                too_large=quadratic_arrays,
            )
            for name in ("gemma2_9b", "mistral_7b", "mpt_7b")
        ),
        Case(
            name="mixtral_8x7b",
            topology="v5p:4x4x8",
            mesh=MeshConfig(fsdp=16, expert=8),
            rows=128,
            length=4096,
            chip_gib=95,
            too_large=arrays_by_experts_and_tokens,
        ),
        Case(
            name="deepseek_v3",
            topology="v5p:8x8x16",
            mesh=MeshConfig(fsdp=8, expert=16, tensor=8),
            rows=128,
            length=4096,
            chip_gib=95,
            too_large=arrays_by_experts_and_tokens,
        ),
        *(
            Case(
                name=f"{name}_h200",
                config=name,
                topology="h200:8",
                mesh=MeshConfig(fsdp=8),
                rows=8,
                length=8192,
                chip_gib=131,
                too_large=score_arrays,
            )
            for name in ("llama3_8b", "gemma2_9b", "mistral_7b", "mpt_7b")
        ),
        Case(
            name="mixtral_8x7b_h200",
            config="mixtral_8x7b",
            topology="h200:8",
            mesh=MeshConfig(fsdp=1, expert=8),
            rows=8,
            length=4096,
            chip_gib=131,
            too_large=arrays_by_experts_and_tokens,
        ),
    )
}


def compile_case(case: Case, attention_kernel: str = "auto") -> CompiledStep:
    mesh = topology_mesh(case.mesh, case.topology)
    blueprint = make_blueprint(case.model, OptimizerConfig(), 1000, mesh)
    execution = Execution(
        compute_dtype=jnp.dtype("bfloat16"),
        attention_kernel=attention_kernel,
        hardware=hardware(mesh.devices.flat[0]),
    )
    return compile_step(blueprint, execution, LossOptions(), abstract_batch(case.rows, case.length, 1, mesh))


def row(case: Case, step: CompiledStep, attention_kernel: str) -> dict[str, Any]:
    """What is printed of a case."""
    gib = {
        "temp_gib": step.temp_bytes / GIB,
        "argument_gib": step.argument_bytes / GIB,
        "total_gib": step.total_bytes / GIB,
        "chip_gib": case.chip_gib,
    }
    compiler = "libtpu" if case.platform == "tpu" else "jax-cuda13-plugin"
    peer = {}
    if case.peer_temp_gib is not None:
        peer = {"ratio": round(case.peer_temp_gib / gib["temp_gib"], 3), "peer_temp_gib": case.peer_temp_gib}
    return {
        "name": "compile_steps",
        "model": case.name,
        "attention_kernel": attention_kernel,
        **peer,
        **{name: round(number, 3) for name, number in gib.items()},
        "too_large": sorted(f"{found.dtype}{list(found.shape)}" for found in case.too_large(case, step.text)),
        "collectives": {kind: found._asdict() for kind, found in step.collectives.items()},
        "flops": step.flops,
        "seconds": round(step.seconds, 1),
        "topology": case.topology,
        "mesh": {axis: getattr(case.mesh, axis) for axis in AXES},
        "rows": case.rows,
        "length": case.length,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", compiler)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=CASES)
    parser.add_argument("--attention-kernel", default="auto", help="as train.attention_kernel")
    arguments = parser.parse_args()
    case = CASES[arguments.model]
    jax.config.update("jax_platforms", "cpu")
    print(json.dumps(row(case, compile_case(case, arguments.attention_kernel), arguments.attention_kernel)))


if __name__ == "__main__":
    main()
