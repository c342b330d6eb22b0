"""What a run's step needs on a topology: the parts of the answer, put together."""

import dataclasses
from typing import Any

from jax.sharding import AbstractMesh

from lmjax.errors import InputError
from lmjax.hardware import peak_flops
from lmjax.mesh import AXES, MeshConfig, axis_sizes, crossing
from lmjax.models.counts import parameter_count
from lmjax.ops.experts import choose_exchange
from lmjax.plan.compile import CompiledStep, kept_or_compiled, topology_mesh
from lmjax.plan.cost import Bound, Cost, bound, cost
from lmjax.plan.hlo import sent_by_axis
from lmjax.plan.layout import check_layout
from lmjax.plan.memory import Stage, moments_bytes, peak, stages
from lmjax.plan.saved import offloaded_bytes
from lmjax.plan.share import Setup
from lmjax.plan.topology import Topology, parse_topology, topology_devices
from lmjax.train.job import (
    Job,
    check_moments,
    check_routing,
    check_shapes,
    check_steps,
    choose_kernels,
    lower_program,
    make_program,
)
from lmjax.xla_flags import flags_for

COMPILERS = (0, 12)
"""The JAX whose compilers the account of memory is of. With those of 0.10 a step was seen to take 40% more on CPUs."""
MARGIN = 0.12
"""By how much more than its estimate a step may need (the largest error that tests allow): with it, it has to fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's step on a topology."""

    topology: Topology
    mesh: MeshConfig
    setup: Setup
    stages: tuple[Stage, ...]
    cost: Cost
    bound: Bound | None
    """None for CPUs."""
    compiled: CompiledStep | None
    """None where it was not asked for."""

    @property
    def peak(self) -> Stage:
        return peak(self.stages)

    @property
    def memory(self) -> int | None:
        """Of a device, for a program; None for CPUs."""
        return None if self.topology.machine is None else self.topology.machine.program_memory

    @property
    def fits(self) -> bool | None:
        """By the compiler's figure, or by the estimate and MARGIN; None for CPUs, and for what the estimate has no
        account of, where only the compiler can say."""
        if self.memory is None or (self.compiled is None and unaccounted(self.setup) is not None):
            return None
        needed = self.peak.bytes * (1 + MARGIN) if self.compiled is None else self.compiled.total_bytes
        return needed <= self.memory

    @property
    def mfu_bound(self) -> float | None:
        """Model flops utilisation (PaLM's, ``training_flops``) of a step that takes no longer than the bound."""
        if self.bound is None or self.topology.machine is None:
            return None
        peak = peak_flops(self.topology.machine.device_kind)
        assert peak is not None
        return self.cost.model_flops / (self.bound.seconds * peak * self.topology.num_devices)


def unaccounted(setup: Setup) -> str | None:
    """What of a step the account of memory does not have yet, in words; None where it has all."""
    if setup.hardware.platform == "tpu" and any(each.name == "reference" for each in setup.kernels.values()):
        return "attention that has all scores at once (the kernel `reference`) on TPUs"
    if setup.remat.offload:
        return "values that go to the hosts (train.remat.offload)"
    if "projection" in setup.remat.save:
        return "the results of all products beside others (projection in train.remat.save)"
    return None


def make_setup(job: Job, topology: Topology) -> Setup:
    """Raises InputError for a config that does not fit the topology or itself."""
    sizes = axis_sizes(job.mesh, topology.num_devices)
    parts = job.mesh.dcn_data * job.mesh.dcn_fsdp
    if parts != topology.slices and (topology.hardware.platform == "tpu" or parts > 1):
        raise InputError(
            f"mesh: dcn_data {job.mesh.dcn_data} x dcn_fsdp {job.mesh.dcn_fsdp} = {parts}, but {topology.name} has "
            f"{topology.slices} slice(s). Set mesh.dcn_data={topology.slices}, or other factors of {topology.slices}."
        )
    across = crossing(job.mesh)
    check_layout(topology, tuple((axis, size // across.get(axis, 1)) for axis, size in sizes.items()))
    mesh: Any = AbstractMesh(tuple(sizes.values()), AXES)
    check_shapes(job, mesh)
    check_routing(job, mesh)
    check_steps(job)
    flags_for(topology.hardware, job.train.xla_flags)
    check_moments(job, topology.hardware)
    return Setup(
        model=job.model,
        hardware=topology.hardware,
        sizes=sizes,
        rows=job.train.global_batch_size // job.train.accumulation,
        length=job.data.sequence_length,
        accumulation=job.train.accumulation,
        compute_bytes=job.precision.compute_dtype.itemsize,
        remat=job.train.remat,
        moments_on_host=job.train.moments_on_host,
        kernels=choose_kernels(job, topology.hardware),
        exchange=choose_exchange(
            job.train.expert_exchange,
            1 if job.model.moe is None else job.model.moe.experts_per_token,
            sizes["expert"],
            topology.hardware.platform,
        ),
        loss_chunk_tokens=job.train.loss_chunk_tokens,
        reduce_in_float32=job.precision.reduce_in_float32,
    )


def make_plan(
    job: Job, topology_name: str, *, compiles: bool = False, executable: str | None = None, lists_arrays: bool = False
) -> Plan:
    """The estimate, and with ``compiles`` the compiler's own figures too, its arrays, and the compiled step in a file.

    Raises InputError for an unknown topology, a mesh that does not go with it, and a compiler that is not installed.
    """
    topology = parse_topology(topology_name)
    if executable is not None and job.train.moments_on_host and topology.hardware.platform == "gpu":
        raise InputError(
            "--executable: of GPUs that are not here JAX cannot tell that they have a host's memory, so that the step "
            "compiled here is not the one that they run. Leave --executable or train.moments_on_host out."
        )
    if compiles:
        topology_devices(topology_name)  # devices of a CPU have to be asked for before JAX looks for any
    setup = make_setup(job, topology)
    found = cost(setup, job.mesh, topology)
    return Plan(
        topology=topology,
        mesh=job.mesh,
        setup=setup,
        stages=stages(setup),
        cost=found,
        bound=bound(found, topology),
        compiled=_compiled(job, topology_name, executable, lists_arrays) if compiles else None,
    )


def _compiled(job: Job, topology_name: str, executable: str | None, lists_arrays: bool) -> CompiledStep:
    program = make_program(job, topology_mesh(job.mesh, topology_name))
    lowered = lower_program(job, program)
    return kept_or_compiled(lowered, program.mesh, job.train.xla_flags, executable, lists_arrays=lists_arrays)


def as_json(plan: Plan) -> dict[str, Any]:
    """What ``lmjax plan --json`` prints. Bytes and operations are of one device unless they say otherwise."""
    setup, largest = plan.setup, plan.peak
    tokens = setup.tokens
    found: dict[str, Any] = {
        "topology": plan.topology.name,
        "devices": plan.topology.num_devices,
        "chip_devices": 1 if plan.topology.machine is None else plan.topology.machine.chip_devices,
        "mesh": dict(setup.sizes),
        "dcn": crossing(plan.mesh),
        "parameters": parameter_count(setup.model),
        "active_parameters": parameter_count(setup.model, active=True),
        "tokens_per_step": tokens,
        "attention_kernels": {kind: choice._asdict() for kind, choice in setup.kernels.items()},
        "estimate_bytes": largest.bytes,
        "device_bytes": plan.memory,
        "host_bytes": (moments_bytes(setup) if setup.moments_on_host else 0) + offloaded_bytes(setup),
        "fits": plan.fits,
        "unaccounted": unaccounted(setup),
        "margin": MARGIN,
        "estimate_of": f"JAX {'.'.join(map(str, COMPILERS))}",
        "peak": largest.name,
        "arrays": [array._asdict() for array in sorted(largest.arrays, key=lambda array: -array.bytes)],
        "stages": [{"name": stage.name, "bytes": stage.bytes, "by_kind": stage.bytes_by_kind} for stage in plan.stages],
        "model_flops": plan.cost.model_flops,
        "flops": plan.cost.flops,
        "memory_traffic_bytes": plan.cost.memory_bytes,
        "traffic": [traffic._asdict() for traffic in plan.cost.traffic],
        "step_seconds_bound": None,
        "step_seconds_predicted": None,
        "tokens_per_second_bound": None,
        "mfu_bound": None,
        "bounds": None,
    }
    if plan.bound is not None:
        found |= {
            "step_seconds_bound": plan.bound.seconds,
            "step_seconds_predicted": plan.bound.predicted,
            "tokens_per_second_bound": tokens / plan.bound.seconds,
            "mfu_bound": plan.mfu_bound,
            "bounds": plan.bound._asdict(),
        }
    if plan.compiled is not None:
        found |= {
            "compiled_bytes": plan.compiled.total_bytes,
            "compile_seconds": plan.compiled.seconds,
            "compiled_before": plan.compiled.is_kept,
            "xla_flags": dict(plan.compiled.flags),
            "unknown_xla_flags": list(plan.compiled.unknown_flags),
            "kernel_memory": plan.compiled.kernel_memory,
            "collectives": {kind: each._asdict() for kind, each in plan.compiled.collectives.items()},
            "sent": [each._asdict() for each in sent_by_axis(plan.compiled.text, setup.sizes)],
        }
        if plan.compiled.arrays is not None:
            found["compiled_arrays"] = [array._asdict() for array in plan.compiled.arrays]
    return found
