"""The machines that a step is planned for, by name: what they have, and their devices for the compiler.

A name is a generation and how many there are of it: ``v5p:4x4x4`` (a slice, by the sizes of its mesh of chips),
``2xv5p:8x8x8`` (two slices), ``h200:8`` (a host's GPUs), ``16xh200:8`` (hosts), ``cpu:8`` (forced devices of the CPU
here).
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from lmjax.errors import InputError
from lmjax.hardware import CPU, DEVICES, GPU_MEMORY_FRACTION, Hardware

GIB = 2**30
GB = 1e9

EXAMPLES = ("v5e:4x4", "v5p:4x4x4", "2xv5p:8x8x8", "v6e:16x16", "h200:8", "16xh200:8", "cpu:8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """A device of a generation, and how it is connected. Bytes are of one device, bandwidths in bytes per second."""

    device_kind: str
    """As JAX calls it, and ``lmjax.hardware.DEVICES`` has it."""
    memory: int
    """Of a TPU what a program may use, of a GPU all that it has."""
    memory_bandwidth: float
    link_bandwidth: float
    """What a device sends, over all its links, to others of its slice (ICI) or host (NVLink)."""
    network_bandwidth: float
    """What it sends to other slices or hosts."""
    host_bandwidth: float
    """What it fetches from its host's memory, or sends there."""
    shapes: tuple[tuple[int, ...], ...]
    """Sizes of a slice's mesh of chips, or of a host: each sorted, the smaller ones first."""
    chip_devices: int = 1
    """Devices of a chip."""

    @property
    def hardware(self) -> Hardware:
        return DEVICES[self.device_kind].hardware

    @property
    def program_memory(self) -> int:
        """What a program may use."""
        return int(self.memory * (GPU_MEMORY_FRACTION if self.hardware.platform == "gpu" else 1))


def _square_shapes() -> tuple[tuple[int, ...], ...]:
    """Of generations whose chips form a mesh of two dimensions, and are to be had one by one."""
    return ((1, 1), *((a, b) for a in (2, 4, 8, 16) for b in (a, 2 * a) if b <= 16))


def _cube_shapes(most_chips: int) -> tuple[tuple[int, ...], ...]:
    """Of those with three: parts of a cube of 4 x 4 x 4, and whole cubes."""
    sizes = range(4, 33, 4)
    whole = ((a, b, c) for a in sizes for b in sizes if b >= a for c in sizes if c >= b and a * b * c <= most_chips)
    return ((1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4), *sorted(whole, key=math.prod))


def _gpu(
    device_kind: str, memory_gib: float, bandwidth_gb: float, link_gb: float, network_gb: float, host_gb: float
) -> Machine:
    return Machine(
        device_kind=device_kind,
        memory=int(memory_gib * GIB),
        memory_bandwidth=bandwidth_gb * GB,
        link_bandwidth=link_gb * GB,
        network_bandwidth=network_gb * GB,
        host_bandwidth=host_gb * GB,
        shapes=tuple((gpus,) for gpus in (1, 2, 4, 8)),
    )


MACHINES = {
    # Memory: what libtpu says that it has for a program, the least of its versions in use. The rest: Google Cloud's
    # pages on the generations (HBM and bidirectional ICI bandwidth a chip, of which one direction is half; DCN
    # bandwidth a chip), and for v4 arXiv 2304.01433, table 4 (six links of 50 GB/s). The host's link (PCIe, each way, a
    # chip): "How to Scale Your Model" (jax-ml.github.io/scaling-book), chapter 2; for TPU7x it is not published, and
    # v6e's stands here.
    "v4": Machine(
        device_kind="TPU v4",
        memory=int(30.75 * GIB),
        memory_bandwidth=1200 * GB,
        link_bandwidth=300 * GB,
        network_bandwidth=6.25 * GB,
        host_bandwidth=16 * GB,
        shapes=_cube_shapes(4096),
    ),
    "v5e": Machine(
        device_kind="TPU v5 lite",
        memory=int(15.75 * GIB),
        memory_bandwidth=819 * GB,
        link_bandwidth=200 * GB,
        network_bandwidth=3.125 * GB,
        host_bandwidth=15 * GB,
        shapes=_square_shapes(),
    ),
    "v5p": Machine(
        device_kind="TPU v5p",
        memory=int(95.73 * GIB),
        memory_bandwidth=2765 * GB,
        link_bandwidth=600 * GB,
        network_bandwidth=6.25 * GB,
        host_bandwidth=15 * GB,
        shapes=_cube_shapes(6144),
    ),
    "v6e": Machine(
        device_kind="TPU v6 lite",
        memory=int(31.24 * GIB),
        memory_bandwidth=1638 * GB,
        link_bandwidth=400 * GB,
        network_bandwidth=12.5 * GB,
        host_bandwidth=32 * GB,
        shapes=_square_shapes(),
    ),
    "tpu7x": Machine(
        device_kind="TPU7x",
        memory=int(94.74 * GIB),
        memory_bandwidth=7380 * GB / 2,
        link_bandwidth=600 * GB / 2,
        network_bandwidth=12.5 * GB / 2,
        host_bandwidth=32 * GB / 2,
        shapes=_cube_shapes(9216),
        chip_devices=2,
    ),
    # NVIDIA's data sheets: memory bandwidth, NVLink and PCIe (of which one direction is half); memory as nvidia-smi
    # tells it.
    # The network is that of hosts with a 400 Gb/s adapter for each GPU (A100: 200).
    "a100": _gpu("NVIDIA A100", 80.0, 2039, 300, 25, 32),
    "h100": _gpu("NVIDIA H100", 79.6, 3350, 450, 50, 64),
    "h200": _gpu("NVIDIA H200", 140.4, 4800, 450, 50, 64),
    "b200": _gpu("NVIDIA B200", 179.0, 8000, 900, 50, 64),
}
"""By the generation in a topology's name."""

CPU_DEVICES = 64
"""Forced devices of a host, at most."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices, or hosts with GPUs, all alike."""

    name: str
    generation: str
    slices: int
    """Slices of TPUs, hosts of GPUs."""
    shape: tuple[int, ...]
    """Of the chips of a slice, or the devices of a host."""

    @property
    def machine(self) -> Machine | None:
        """None for CPUs: whatever this one is."""
        return MACHINES.get(self.generation)

    @property
    def hardware(self) -> Hardware:
        return CPU if self.machine is None else self.machine.hardware

    @property
    def slice_devices(self) -> int:
        return math.prod(self.shape) * (1 if self.machine is None else self.machine.chip_devices)

    @property
    def num_devices(self) -> int:
        return self.slices * self.slice_devices


def parse_topology(name: str) -> Topology:
    """Raises InputError, with the nearest names, for one that there is not."""
    found = re.fullmatch(r"(?:([1-9]\d{0,5})x)?([a-z]\w*):([1-9]\d{0,5}(?:x[1-9]\d{0,5})*)", name)
    if found is None or found[2] not in (*MACHINES, "cpu"):
        if told := _told_by_cloud_name(name):
            raise InputError(f"topology {name!r}: {told}")
        near = difflib.get_close_matches(name, sorted({*EXAMPLES, *_names()}), n=3, cutoff=0.5)
        raise InputError(
            f"topology {name!r}: not known{', near it are ' if near else ''}{', '.join(near)}. A name is a generation "
            f"({', '.join((*MACHINES, 'cpu'))}) and how many there are of it, such as {', '.join(EXAMPLES)}."
        )
    slices, generation, sizes = int(found[1] or 1), found[2], tuple(map(int, found[3].split("x")))
    topology = Topology(name, generation, slices, sizes)
    machine = topology.machine
    if machine is None:
        if slices > 1 or len(sizes) > 1 or topology.num_devices > CPU_DEVICES:
            raise InputError(f"topology {name!r}: a name is cpu:DEVICES, up to cpu:{CPU_DEVICES}, such as cpu:8")
    elif tuple(sorted(sizes)) not in machine.shapes:
        raise InputError(f"topology {name!r}: {generation} does not come in {found[3]}. {_shapes_near(topology)}")
    return topology


CORES_COUNTED = ("v4", "v5p")
"""Generations whose accelerator types in Google Cloud count TensorCores, two a chip; v5e's and v6e's count chips."""


def _told_by_cloud_name(name: str) -> str | None:
    """What to write in place of an accelerator type of Google Cloud, as v5p-64; None for any other name."""
    found = re.fullmatch(r"(v4|v5p|v5e|v5litepod|v6e)-([1-9]\d{0,5})", name)
    if found is None:
        return None
    generation, counted = found[1].replace("litepod", "e"), int(found[2])
    chips, rest = divmod(counted, 2) if generation in CORES_COUNTED else (counted, 0)
    shapes = [shape for shape in MACHINES[generation].shapes if math.prod(shape) == chips and not rest]
    said = f"Google's name counts {'TensorCores, of which a chip has two' if generation in CORES_COUNTED else 'chips'}"
    if not shapes:
        return f"{said}; {generation} does not come in so many. {_shapes_near(Topology(name, generation, 1, (chips,)))}"
    named = [f"{generation}:{sizes_text(shape)}" for shape in sorted(shapes, key=sum)]
    return f"{said}; here it is {' or '.join(named)}, by the sizes of its mesh of chips."


def _names() -> Iterator[str]:
    """One slice or host of every generation and shape."""
    for generation, machine in MACHINES.items():
        for shape in machine.shapes:
            yield f"{generation}:{sizes_text(shape)}"


def sizes_text(shape: tuple[int, ...]) -> str:
    """As a topology's name has it."""
    return "x".join(map(str, shape[1:] + shape[:1] if shape[0] == 1 else shape))


def _shapes_near(topology: Topology) -> str:
    """The shapes with the next fewer and the next more chips."""
    assert topology.machine is not None
    wanted = math.prod(topology.shape)
    fewer = [shape for shape in topology.machine.shapes if math.prod(shape) <= wanted][-2:]
    more = [shape for shape in topology.machine.shapes if math.prod(shape) > wanted][:2]
    near = ", ".join(f"{topology.generation}:{sizes_text(shape)}" for shape in (*fewer, *more))
    if len(topology.machine.shapes[0]) == 1:
        return f"Near it are {near}; several hosts are HOSTSx{topology.generation}:GPUS."
    return f"Near it are {near}; several slices are SLICESx{topology.generation}:SIZES."


TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
"""What libtpu asks a cloud machine for when it is loaded, and what lets several processes load it."""


@functools.cache
def topology_devices(name: str) -> tuple[Any, ...]:
    """The devices of a topology, for meshes and compiles; they need not be here.

    Raises InputError for a name that there is not, and where its compiler is not installed.
    """
    topology = parse_topology(name)
    if topology.hardware.platform == "cpu":
        return _forced_devices(topology)
    return _tpus(topology) if topology.hardware.platform == "tpu" else _gpus(topology)


def _forced_devices(topology: Topology) -> tuple[Any, ...]:
    if jax.config.values["jax_num_cpu_devices"] < topology.num_devices:
        with contextlib.suppress(RuntimeError):  # JAX has looked for devices already
            jax.config.update("jax_num_cpu_devices", topology.num_devices)
    devices = jax.devices("cpu")
    if len(devices) < topology.num_devices:
        raise InputError(
            f"topology {topology.name!r}: this process has {len(devices)} CPU devices already; ask for them first, or "
            f"set XLA_FLAGS=--xla_force_host_platform_device_count={topology.num_devices}"
        )
    return tuple(devices[: topology.num_devices])


def _tpus(topology: Topology) -> tuple[Any, ...]:
    for variable, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.generation == "v4":  # its two cores are one device, as JAX has it on such a chip
        options["chip_config_name"] = "megacore"
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    name = f"{topology.generation}:{sizes_text(topology.shape)}"
    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"topology {topology.name!r}: not one that the TPU compiler knows ({str(error).splitlines()[0]}). "
            f"{_shapes_near(topology)}"
        ) from error
    except RuntimeError as error:  # no library that could be asked
        raise InputError(
            f"compiling for TPU needs libtpu ({str(error).splitlines()[0]}). Install the extra: pip install "
            "'lmjax[tpu]'."
        ) from error


class _GPUTarget(NamedTuple):
    """What the GPU compiler asks a device for, where generations differ."""

    capability: int
    cores: int
    clock_ghz: float
    core_units: int
    """For float32 operations."""
    shared_memory: int
    """Of a core, in bytes; a block may have 1 KiB less."""
    l2_cache: int


_GPU_TARGETS = {
    "a100": _GPUTarget(8, 108, 1.41, 64, 164 << 10, 40 << 20),
    "h100": _GPUTarget(9, 132, 1.98, 128, 228 << 10, 50 << 20),
    "h200": _GPUTarget(9, 132, 1.98, 128, 228 << 10, 60 << 20),
    "b200": _GPUTarget(10, 148, 1.965, 128, 228 << 10, 126 << 20),
}


def _gpus(topology: Topology) -> tuple[Any, ...]:
    try:
        import jax_plugins.xla_cuda13  # noqa: F401  # pyright: ignore[reportMissingImports]  (registers the compiler)
    except ImportError as error:
        raise InputError(
            f"compiling for GPUs needs JAX's CUDA plugin ({error}). Install the extra: pip install 'lmjax[cuda13]'."
        ) from error
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name=topology.generation,
        target_config=_gpu_target(topology.generation),
        topology=f"1x{topology.slices}x{topology.slice_devices}",
    )
    return tuple(found.devices)


def _gpu_target(generation: str) -> str:
    machine, target = MACHINES[generation], _GPU_TARGETS[generation]
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_block_optin: {target.shared_memory - 1024}
          shared_memory_per_core: {target.shared_memory}
          core_count: {target.cores} fpus_per_core: {target.core_units} clock_rate_ghz: {target.clock_ghz}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          memory_bandwidth: {int(machine.memory_bandwidth)} l2_cache_size: {target.l2_cache}
          device_memory_size: {machine.memory}
          cuda_compute_capability {{ major: {target.capability} minor: 0 }}
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        device_description_str: "{machine.device_kind}"
    """
