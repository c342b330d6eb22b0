"""A train step compiled for devices that are not here: what it needs, and what it sends."""

import dataclasses
import re
import time

import jax
from jax.sharding import Mesh

from lmjax.compat import temporary_bytes
from lmjax.errors import InputError
from lmjax.mesh import MeshConfig, make_mesh
from lmjax.models.decoder import Execution
from lmjax.ops.cross_entropy import LossOptions
from lmjax.plan.hlo import Collective, collectives
from lmjax.plan.topology import topology_devices
from lmjax.train.state import Blueprint
from lmjax.train.step import DeviceBatch, make_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """One device's share of a compiled train step. Collectives and flops count a loop's body once."""

    argument_bytes: int
    """State and batch."""
    output_bytes: int
    """New state and metrics."""
    temp_bytes: int
    """What the step needs besides, at its peak."""
    alias_bytes: int
    """Of the outputs, what lies where the donated arguments were."""
    collectives: dict[str, Collective]
    """By kind."""
    flops: float | None
    """Floating-point operations that the compiler knows of; those of kernels are not among them."""
    seconds: float
    """That tracing and compiling took."""
    text: str = dataclasses.field(repr=False)
    """The compiled program in HLO."""

    @property
    def total_bytes(self) -> int:
        """Of device memory that the step needs."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes - self.alias_bytes


def topology_mesh(config: MeshConfig, name: str) -> Mesh:
    """A mesh of the devices of the topology ``name``. Raises InputError where the sizes do not fit it."""
    return make_mesh(config, topology_devices(name))


def compile_step(blueprint: Blueprint, execution: Execution, options: LossOptions, batch: DeviceBatch) -> CompiledStep:
    """Compile what ``make_step`` gives for batches of the shapes of ``batch``; the mesh's devices need not be here.

    Raises InputError for a step that does not fit the devices' memory.
    """
    mesh, platform = blueprint.mesh, execution.hardware.platform
    platform = "cuda" if platform == "gpu" else platform
    began = time.perf_counter()
    step = jax.jit(make_step(blueprint, execution, options), donate_argnums=0)
    with jax.set_mesh(mesh):
        lowered = step.trace(blueprint.state, batch).lower(lowering_platforms=(platform,))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise InputError(
                f"the step does not fit the memory of a {mesh.devices.flat[0].device_kind} on mesh {dict(mesh.shape)}: "
                f"{_sizes(error)} Lower train.global_batch_size, raise train.accumulation, keep less (train.remat), or "
                "shard further (mesh.fsdp, mesh.expert, mesh.tensor)."
            ) from error
    seconds = time.perf_counter() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    return CompiledStep(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=temporary_bytes(compiled),
        alias_bytes=memory.alias_size_in_bytes,
        collectives=collectives(text),
        flops=(compiled.cost_analysis() or {}).get("flops"),
        seconds=seconds,
        text=text,
    )


def _sizes(error: Exception) -> str:
    """The first sentence of the compiler's message, which has them; a list of allocations may follow."""
    found = re.search(r"Ran out of memory.*?(?:\.(?=\s|$)|$)", str(error), re.DOTALL)
    return str(error) if found is None else " ".join(found[0].split())
