"""A train step compiled for devices that are not here: what it needs, and what it sends."""

import dataclasses
import functools
import os
import re
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from lmjax.compat import temporary_bytes
from lmjax.errors import InputError
from lmjax.mesh import MeshConfig, make_mesh
from lmjax.models.decoder import Execution
from lmjax.ops.cross_entropy import LossOptions
from lmjax.plan.hlo import Collective, collectives
from lmjax.train.state import Blueprint
from lmjax.train.step import DeviceBatch, make_step

EXAMPLES = ("v4:2x2x2", "v5e:4x4", "v5p:2x2x1", "v5p:4x4x4", "v6e:2x2", "v6e:16x16", "tpu7x:2x2x1")
GPU_EXAMPLE = "h200:8"
"""Names of topologies; a generation of TPUs takes every size that its pods come in."""

GPUS = {
    "h200": """
        gpu_device_info {
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
          core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          memory_bandwidth: 4800000000000 l2_cache_size: 62914560 device_memory_size: 150000000000
          cuda_compute_capability { major: 9 minor: 0 }
        }
        platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } device_description_str: "NVIDIA H200"
    """
}
"""What the GPU compiler asks a device for, by the generation in a topology's name."""

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
"""What libtpu asks a cloud machine for when it is loaded, and what lets several processes load it."""


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


@functools.cache
def topology_devices(name: str) -> tuple[Any, ...]:
    """The devices of the topology ``name``, such as v5p:4x4x4: 64 chips in a cube; or h200:2x8: two machines of 8 GPUs.

    Raises InputError for a name that the compiler does not know, and where that is not installed.
    """
    generation, _, sizes = name.partition(":")
    if generation in GPUS:
        return _gpus(name, generation, sizes)
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"topology {name!r}: not one that the TPU compiler knows ({_first_line(error)}). Names are a generation "
            f"and the sizes of its mesh of chips, such as {', '.join((*EXAMPLES, GPU_EXAMPLE))}."
        ) from error
    except RuntimeError as error:  # no library that could be asked
        raise InputError(
            f"compiling for TPU needs libtpu ({_first_line(error)}). Install the extra: pip install 'lmjax[tpu]'."
        ) from error


def _gpus(name: str, generation: str, sizes: str) -> tuple[Any, ...]:
    if re.fullmatch(r"([1-9]\d*x)?[1-9]\d*", sizes) is None:
        raise InputError(
            f"topology {name!r}: a name is {generation}:GPUS or {generation}:MACHINESxGPUS, as {GPU_EXAMPLE}"
        )
    try:
        import jax_plugins.xla_cuda13  # noqa: F401  # pyright: ignore[reportMissingImports]  (registers the compiler)
    except ImportError as error:
        raise InputError(
            f"compiling for GPUs needs JAX's CUDA plugin ({error}). Install the extra: pip install 'lmjax[cuda13]'."
        ) from error
    machines, _, gpus = sizes.rpartition("x")
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name=generation,
        target_config=GPUS[generation],
        topology=f"1x{machines or 1}x{gpus}",
    )
    return tuple(found.devices)


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


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _sizes(error: Exception) -> str:
    """The first sentence of the compiler's message, which has them; a list of allocations may follow."""
    found = re.search(r"Ran out of memory.*?(?:\.(?=\s|$)|$)", str(error), re.DOTALL)
    return str(error) if found is None else " ".join(found[0].split())
