"""The only place that knows the differences between JAX and Flax versions, and their private names."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed

try:
    from flax import nnx
except ModuleNotFoundError as error:  # a machine that has JAX alone, where kernels can be measured
    if error.name != "flax":
        raise
else:
    nnx.set_graph_mode(False)  # modules are plain pytrees: no shared references, no updates behind the caller's back
    nnx.set_graph_updates(False)


def coordination_client():
    """The key-value store of ``jax.distributed`` (None in a run of one process that never initialised it)."""
    return distributed.global_state.client


def device_memory_peak(device: Any) -> int | None:
    """Bytes in use at the peak on ``device``, where its runtime tells."""
    stats = device.memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def temporary_bytes(compiled: jax.stages.Compiled) -> int:
    """Of a device's memory, what a compiled program needs at its peak besides arguments and outputs."""
    memory: Any = compiled.memory_analysis()
    if next(iter(jax.tree.leaves(compiled.input_shardings)[0].device_set)).platform == "cpu":
        return memory.temp_size_in_bytes  # the peak there is of arguments and outputs alone
    # What is called temporaries has other things in it, or less, up to libtpu 0.0.50: of a train step 8.1 GiB where the
    # compiler's own assignment of buffers has 5.2. The peak is that of the assignment in all versions.
    lasting = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # What arguments have in the host's memory is in it, and in them it is not.
    lasting += memory.host_argument_size_in_bytes
    return max(0, memory.peak_memory_in_bytes - lasting)


@contextlib.contextmanager
def compiling_anew() -> Iterator[None]:
    """Leave JAX's own cache of compiled programs alone: what is read from it, CPUs cannot always write down again."""
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # else it goes by what it found when it was first asked
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def varying_axes(array: jax.Array) -> frozenset[str]:
    """The mesh axes of a shard_map over which ``array`` may differ between devices; none outside of one."""
    return jax.typeof(array).manual_axis_type.varying  # pyright: ignore[reportAttributeAccessIssue]


def mosaic_gpu_kernel(body: Callable[..., None], *, cost_estimate: Any, **options: Any) -> Callable[..., Any]:
    """Pallas's kernel for NVIDIA GPUs, which takes the cost of a call from JAX 0.12 on."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if "cost_estimate" in inspect.signature(plgpu.kernel).parameters:
        options["cost_estimate"] = cost_estimate
    return plgpu.kernel(body, **options)


def load_registers(ref: Any, layout: Any) -> jax.Array:
    """What is in a reference of Pallas's Mosaic GPU, in registers of ``layout``."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    load: Any = plgpu.load
    return load(ref, (), layout=layout) if "idx" in inspect.signature(load).parameters else load(ref, layout=layout)


def transposed_ref(ref: Any) -> Any:
    """A reference of Pallas's Mosaic GPU to the same matrix transposed."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))
