"""The device mesh: named axes, their sizes, and the start of several processes."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from lmjax.errors import InputError
from lmjax.schema import config_class

AXES = ("data", "fsdp", "tensor")
"""``data`` replicates parameters, ``fsdp`` shards them and the batch, ``tensor`` shards heads, MLP and vocabulary."""

BATCH_AXES = ("data", "fsdp")
"""The mesh axes over which the sequences of a batch are split."""

SHUTDOWN_SECONDS = 60
"""How long a process that ends waits for the others: one that failed alone must not hold up its launcher for long."""


@config_class
class MeshConfig:
    """How many devices each axis has. One entry may be -1: whatever the others leave."""

    data: int = 1
    """Replicas of the parameters, each with its own share of the batch."""
    fsdp: int = -1
    """Devices over which parameters, gradients and moments are split; the batch is split over them too."""
    tensor: int = 1
    """Devices over which heads, MLP and vocabulary are split."""

    def __post_init__(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise ValueError(f"mesh.{axis} is {size}; an axis has 1 device or more, or -1 for what is left")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"only one axis of the mesh may be -1, found {sizes}")


def axis_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """The size of every axis on ``num_devices`` devices. Raises InputError, with the arithmetic, where none fits."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    product = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != -1)
    if -1 in sizes.values():
        if num_devices % known:
            raise InputError(
                f"mesh: {product} = {known} does not divide the {num_devices} devices here, so the axis that is -1 has "
                f"no size. Choose sizes whose product divides {num_devices}."
            )
        return {axis: num_devices // known if size == -1 else size for axis, size in sizes.items()}
    if known != num_devices:
        raise InputError(
            f"mesh: {product} = {known} devices, but {num_devices} are here. "
            f"Choose sizes whose product is {num_devices}, or set one axis to -1."
        )
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of ``devices`` (all of them by default) with explicit axes: shardings are part of array types."""
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    shape = tuple(sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def single_device_mesh(device: Any | None = None) -> Mesh:
    """The mesh of one device, with the same axes: nothing has a second code path for it."""
    devices = np.array([device or jax.local_devices()[0]]).reshape((1,) * len(AXES))
    return Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def batch_shards(sizes: Mapping[str, int]) -> int:
    """Into how many parts the sequences of a batch are split."""
    return math.prod(sizes[axis] for axis in BATCH_AXES)


def start_distributed() -> None:
    """Join the other processes of this run, where the environment names a coordinator.

    Read are ``JAX_COORDINATOR_ADDRESS`` (host:port), ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``, as
    ``launch/local.sh`` sets them. Without the first this is a run of one process.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is None or jax.distributed.is_initialized():
        return
    numbers = {}
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        value = os.environ.get(name, "")
        if not value.isdecimal():
            raise InputError(
                f"{name} is {value!r} while JAX_COORDINATOR_ADDRESS is {address!r}. "
                "Set it to a number: all processes count from 0, and JAX_NUM_PROCESSES is how many there are."
            )
        numbers[name] = int(value)
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address,
        numbers["JAX_NUM_PROCESSES"],
        numbers["JAX_PROCESS_ID"],
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
