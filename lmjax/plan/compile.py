"""A train step compiled for devices that are not here: what it needs, and what it sends."""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from lmjax.compat import compiling_anew, temporary_bytes
from lmjax.errors import InputError
from lmjax.hardware import hardware
from lmjax.mesh import MeshConfig, make_mesh
from lmjax.models.decoder import Execution
from lmjax.ops.cross_entropy import LossOptions
from lmjax.paths import cache_root, using_cache
from lmjax.plan.hlo import Collective, collectives, kernel_memory
from lmjax.plan.peak import PeakArray, arrays_of_dump, dump_options
from lmjax.plan.topology import topology_devices
from lmjax.train.executable import about, save_executable
from lmjax.train.state import Blueprint
from lmjax.train.step import DeviceBatch, lower_step
from lmjax.xla_flags import Value, compile_with_flags

FORMAT = 3
"""Of what is kept of a compile: another one where fields or their meaning change."""


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
    host_bytes: int
    """Of state in the memory of the device's host; it is in none of the others."""
    flops: float | None
    """Floating-point operations that the compiler knows of; those of kernels are not among them."""
    seconds: float
    """That compiling took, and tracing where it was done for it."""
    flags: Mapping[str, Value]
    """Of the compiler, that it was compiled with."""
    unknown_flags: tuple[str, ...]
    """That lmjax has for the hardware and the compiler does not know."""
    arrays: tuple[PeakArray, ...] | None = dataclasses.field(default=None, repr=False)
    """What lives in the device's memory at the peak, the largest first; None where it was not asked for."""
    is_kept: bool = False
    """Whether it was compiled before, and this is what was written down."""
    text: str = dataclasses.field(repr=False)
    """The compiled program in HLO."""

    @property
    def total_bytes(self) -> int:
        """Of device memory that the step needs."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes - self.alias_bytes

    @functools.cached_property
    def collectives(self) -> dict[str, Collective]:
        """By kind."""
        return collectives(self.text)

    @functools.cached_property
    def kernel_memory(self) -> dict[str, int]:
        """Bytes of vector memory that a kernel of ours takes, by its name; the compilers for TPU tell it."""
        return kernel_memory(self.text)


def topology_mesh(config: MeshConfig, name: str) -> Mesh:
    """A mesh of the devices of the topology ``name``. Raises InputError where the sizes do not fit it."""
    return make_mesh(config, topology_devices(name))


def compile_step(blueprint: Blueprint, execution: Execution, options: LossOptions, batch: DeviceBatch) -> CompiledStep:
    """Compile what ``make_step`` gives for batches of the shapes of ``batch``; the mesh's devices need not be here.

    Raises InputError for a step that does not fit the devices' memory.
    """
    began = time.perf_counter()
    lowered = lower_step(blueprint, execution, options, batch)
    traced = time.perf_counter() - began
    step = compile_lowered(lowered, blueprint.mesh, {})
    return dataclasses.replace(step, seconds=step.seconds + traced)


def compile_lowered(
    lowered: jax.stages.Lowered,
    mesh: Mesh,
    asked: Mapping[str, Value | None],
    executable: str | None = None,
    *,
    lists_arrays: bool = False,
) -> CompiledStep:
    """Compile a step, with the flags for its hardware and those ``asked`` for, into the file ``executable`` if named.

    With ``lists_arrays`` the compiler writes down where it puts every array, and what lives at the peak is read there.

    Raises InputError for a step that does not fit the devices' memory, and for flags that the compiler refuses.
    """
    began, arrays = time.perf_counter(), None
    is_anew = lists_arrays or executable is not None
    try:
        with compiling_anew() if is_anew else contextlib.nullcontext(), tempfile.TemporaryDirectory() as directory:
            tracing = dump_options(Path(directory)) if lists_arrays else None
            built = compile_with_flags(lowered, hardware(mesh.devices.flat[0]), asked, tracing)
            if lists_arrays:
                arrays = arrays_of_dump(Path(directory))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"the step does not fit the memory of a {mesh.devices.flat[0].device_kind} on mesh {dict(mesh.shape)}: "
            f"{_sizes(error)} Lower train.global_batch_size, raise train.accumulation, keep less (train.remat), "
            "shard further (mesh.fsdp, mesh.expert, mesh.tensor), or put moments on the hosts (train.moments_on_host)."
        ) from error
    seconds = time.perf_counter() - began
    if executable is not None:
        save_executable(executable, built.compiled, about(lowered, mesh, asked))
    memory, text = built.compiled.memory_analysis(), built.compiled.as_text()
    assert memory is not None
    assert text is not None
    return CompiledStep(
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=temporary_bytes(built.compiled),
        alias_bytes=memory.alias_size_in_bytes,
        host_bytes=memory.host_argument_size_in_bytes,
        flops=(built.compiled.cost_analysis() or {}).get("flops"),
        seconds=seconds,
        flags=built.flags,
        unknown_flags=built.unknown,
        arrays=arrays,
        text=text,
    )


def kept_or_compiled(
    lowered: jax.stages.Lowered,
    mesh: Mesh,
    asked: Mapping[str, Value | None],
    executable: str | None = None,
    *,
    lists_arrays: bool = False,
) -> CompiledStep:
    """As ``compile_lowered``, but what was compiled before on this machine is read from its cache.

    It is kept by what ``lmjax.train.executable.about`` tells of it: by nothing that could change behind it. A file
    ``executable`` is compiled anew, and so are arrays that nobody asked for before. Where the cache cannot be written,
    a line on stderr says so.
    """
    what = json.dumps([FORMAT, about(lowered, mesh, asked)], sort_keys=True)
    name = hashlib.sha256(what.encode()).hexdigest()
    file = cache_root() / "plans" / f"{name}.json.gz"
    kept = None if executable is not None else _kept(file)
    if kept is not None and (kept.arrays is not None or not lists_arrays):
        return kept
    step = compile_lowered(lowered, mesh, asked, executable, lists_arrays=lists_arrays)
    try:
        with using_cache():
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{time.time_ns()}")
            temporary.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(step)).encode()))
            temporary.replace(file)  # whole, or not at all
    except InputError as error:  # what took minutes is told all the same
        print(f"lmjax: this compile is not kept: {error}", file=sys.stderr)
    return step


def _kept(file: Path) -> CompiledStep | None:
    """What a file of the cache says; None where there is none, or one that is cut off or damaged."""
    try:
        fields = json.loads(gzip.decompress(file.read_bytes()))
        arrays = None if fields["arrays"] is None else tuple(PeakArray(*array) for array in fields["arrays"])
        read = {"unknown_flags": tuple(fields["unknown_flags"]), "arrays": arrays, "is_kept": True}
        return CompiledStep(**fields | read)
    except (FileNotFoundError, gzip.BadGzipFile, zlib.error, EOFError, ValueError):
        return None


def _sizes(error: Exception) -> str:
    """The first sentence of the compiler's message, which has them; a list of allocations may follow."""
    found = re.search(r"Ran out of memory.*?(?:\.(?=\s|$)|$)", str(error), re.DOTALL)
    return str(error) if found is None else " ".join(found[0].split())
