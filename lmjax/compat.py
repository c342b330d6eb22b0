"""The only place that knows the differences between JAX and Flax versions, and their private names."""

from typing import Any

import jax
from flax import nnx
from jax._src import distributed

nnx.set_graph_mode(False)  # modules are plain pytrees: no shared references, no updates behind the caller's back
nnx.set_graph_updates(False)


def coordination_client():
    """The key-value store of ``jax.distributed`` (None in a run of one process that never initialised it)."""
    return distributed.global_state.client


def device_memory_peak(device: Any) -> int | None:
    """Bytes in use at the peak on ``device``, where its runtime tells."""
    stats = device.memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def varying_axes(array: jax.Array) -> frozenset[str]:
    """The mesh axes of a shard_map over which ``array`` may differ between devices; none outside of one."""
    return jax.typeof(array).manual_axis_type.varying  # pyright: ignore[reportAttributeAccessIssue]
