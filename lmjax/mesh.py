"""The device mesh: named axes, their sizes, inside slices (ICI) and across them (DCN)."""

import collections
import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from lmjax.errors import InputError
from lmjax.schema import config_class

AXES = ("data", "fsdp", "expert", "tensor")
"""``data`` replicates parameters, ``fsdp`` shards them and the batch, ``expert`` shards experts and the batch and is
for all other parameters as fsdp, ``tensor`` shards heads, MLP and vocabulary."""

BATCH_AXES = ("data", "fsdp", "expert")
"""The mesh axes over which the sequences of a batch are split."""

FSDP_AXES = ("fsdp", "expert")
"""The mesh axes over which parameters are split that belong to all tokens."""

TWO_DIMENSIONAL = ("TPU v5 lite", "TPU v5e", "TPU v6 lite", "TPU v6e")
"""Kinds whose mesh of chips has two dimensions, so that all axes have to share them."""


@config_class
class MeshConfig:
    """How many devices each axis has. One of data, fsdp, expert and tensor may be -1: whatever the others leave.

    On several slices of TPUs, dcn_data x dcn_fsdp is the number of slices; the rest of each axis lies inside a slice.
    On several hosts with GPUs it is 1, and axes go over the devices in order, or the number of hosts.
    """

    data: int = 1
    """Replicas of the parameters, each with its own share of the batch."""
    fsdp: int = -1
    """Devices over which parameters, gradients and moments are split; the batch is split over them too."""
    expert: int = 1
    """Devices over which experts are split; what is not an expert's is split over them too, and so is the batch."""
    tensor: int = 1
    """Devices over which heads, MLP and vocabulary are split."""
    dcn_data: int = 1
    """Into how many parts the slow network between slices (or hosts) cuts ``data``; data is a multiple of it."""
    dcn_fsdp: int = 1
    """Into how many parts it cuts ``fsdp``: parameters are then gathered over it, which wants a fast one."""

    def __post_init__(self) -> None:
        sizes = {axis: getattr(self, axis) for axis in AXES}
        for axis, parts in crossing(self).items():
            if parts < 1:
                raise ValueError(f"mesh.dcn_{axis} is {parts}; it has to be 1 or more")
            if sizes[axis] > 0 and sizes[axis] % parts:
                raise ValueError(
                    f"mesh.dcn_{axis} is {parts}, which does not divide mesh.{axis} {sizes[axis]}: the size of an axis "
                    "is that over all slices"
                )
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
        sizes = {axis: num_devices // known if size == -1 else size for axis, size in sizes.items()}
    elif known != num_devices:
        raise InputError(
            f"mesh: {product} = {known} devices, but {num_devices} are here. "
            f"Choose sizes whose product is {num_devices}, or set one axis to -1."
        )
    for axis, parts in crossing(config).items():
        if sizes[axis] % parts:
            raise InputError(
                f"mesh: {num_devices} devices / ({product}) leave {axis} {sizes[axis]}, which does not divide into "
                f"dcn_{axis} {parts} parts: {sizes[axis]} mod {parts} = {sizes[axis] % parts}. Choose other sizes."
            )
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of ``devices`` (all of them by default) with explicit axes: shardings are part of array types.

    Across slices an axis is cut first by its dcn part, so that neighbours on it lie in one slice as far as they can.
    Raises InputError where the sizes do not fit the devices, their slices or the links between them.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    across = [crossing(config).get(axis, 1) for axis in AXES]
    inside = [size // parts for size, parts in zip(sizes.values(), across, strict=True)]
    granule = _granule(config, devices)
    if granule is None:
        arranged = laid_out(sizes, devices)
    else:
        with _told(sizes, devices):
            arranged = mesh_utils.create_hybrid_device_mesh(
                inside,
                across,
                devices,
                process_is_granule=granule == "process_index",
                allow_split_physical_axes=devices[0].device_kind in TWO_DIMENSIONAL,
            )
    return Mesh(arranged, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def laid_out(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices of one slice as an array of these sizes, neighbours beside each other.

    Raises InputError where the links between them do not allow it. Of a device are asked ``platform``,
    ``device_kind``, ``id``, ``process_index`` and, of a TPU, ``coords`` and ``core_on_chip``.
    """
    may_split = devices[0].device_kind in TWO_DIMENSIONAL
    with _told(sizes, devices):
        return mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=may_split)


@contextlib.contextmanager
def _told(sizes: Mapping[str, int], devices: Sequence[Any]) -> Iterator[None]:
    """Turn what JAX says of sizes that do not follow the links into an InputError."""
    try:
        yield
    except NotImplementedError as error:
        reason = str(error).partition("\n")[0].partition(" The size of each")[0]  # then come options of JAX
        raise InputError(
            f"mesh: {dict(sizes)} cannot be laid out on these {len(devices)} devices ({devices[0].device_kind}) so "
            f"that every axis follows the links between chips ({reason}). Choose sizes that are products of those of "
            "the mesh of chips."
        ) from error


def crossing(config: MeshConfig) -> dict[str, int]:
    """The axes that may cross the network between slices or hosts, and into how many parts that cuts each."""
    return {"data": config.dcn_data, "fsdp": config.dcn_fsdp}


def _granule(config: MeshConfig, devices: Sequence[Any]) -> str | None:
    """The attribute that tells the slices or hosts apart between which the slow network lies; None for one of them.

    TPUs know their slice. The slice of a GPU is its host or what NVLink joins; where that is not asked for, the process
    stands for the host.
    """
    parts = config.dcn_data * config.dcn_fsdp
    slices = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    hosts = collections.Counter(device.process_index for device in devices)
    is_tpu = devices[0].platform == "tpu"
    if parts == 1 and (len(slices) == 1 or not is_tpu):
        return None
    counts, granule = (slices, "slice_index") if is_tpu or len(slices) == parts else (hosts, "process_index")
    if len(counts) != parts:
        name = ("slice" if is_tpu else "host") + "s" * (len(counts) > 1)
        raise InputError(
            f"mesh: dcn_data {config.dcn_data} x dcn_fsdp {config.dcn_fsdp} = {parts}, but the {len(devices)} devices "
            f"here form {len(counts)} {name}. Set mesh.dcn_data={len(counts)}, or other factors of {len(counts)}."
        )
    if len(set(counts.values())) > 1:
        raise InputError(f"mesh: slices of unequal size cannot form a mesh: {dict(sorted(counts.items()))} devices")
    return granule


def single_device_mesh(device: Any | None = None) -> Mesh:
    """The mesh of one device, with the same axes: nothing has a second code path for it."""
    devices = np.array([device or jax.local_devices()[0]]).reshape((1,) * len(AXES))
    return Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def batch_shards(sizes: Mapping[str, int]) -> int:
    """Into how many parts the sequences of a batch are split."""
    return math.prod(sizes[axis] for axis in BATCH_AXES)
