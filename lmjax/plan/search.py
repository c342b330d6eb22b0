"""Which mesh, remat policy, micro-batches and place of the moments to take: all there are, by their predicted time."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from lmjax.errors import InputError
from lmjax.mesh import MeshConfig
from lmjax.models.remat import RematConfig
from lmjax.plan.cost import Bound, bound, cost
from lmjax.plan.memory import peak, stages
from lmjax.plan.plan import MARGIN, Plan, make_plan, make_setup, unaccounted
from lmjax.plan.topology import Topology, parse_topology, sizes_text, topology_devices
from lmjax.plan.words import gib
from lmjax.train.job import Job

POLICIES = (
    RematConfig(policy="none"),
    RematConfig(policy="dots"),
    RematConfig(policy="save", save=("query", "key", "value", "attention_out")),
    RematConfig(policy="attention"),
    RematConfig(),
)
"""From the one that keeps most to the one that keeps least."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to carry out a run's step."""

    job: Job
    estimate_bytes: int
    """Of a device, at the peak."""
    bound: Bound

    @property
    def overrides(self) -> dict[str, Any]:
        """What it changes of a run's config, as a file may have it."""
        mesh, train = self.job.mesh, self.job.train
        remat: dict[str, Any] = {"policy": train.remat.policy}
        if train.remat.save:
            remat["save"] = list(train.remat.save)
        sizes = dataclasses.asdict(mesh)  # pyright: ignore[reportArgumentType]
        sizes = {name: size for name, size in sizes.items() if size > 1 or not name.startswith("dcn")}
        changed = {"accumulation": train.accumulation, "remat": remat, "moments_on_host": train.moments_on_host}
        return {"mesh": sizes, "train": changed}


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search went through."""

    fitting: list[Candidate]
    """By predicted seconds, the least first; of those that are within a percent of each other, the one that sends
    less, then the one with less memory."""
    tried: int
    least: Candidate | None
    """Of those that do not fit, the one that needs the least memory."""


def search(job: Job, topology: Topology) -> Found:
    """All meshes of the topology's devices, policies and numbers of micro-batches that ``job`` can be carried out with.

    Where a step does not fit with the moments on the devices, it is tried with them on the hosts.

    The global batch stays as it is. Raises InputError where none can be, and for CPUs, whose speed is not known.
    """
    machine = topology.machine
    if machine is None:
        raise InputError(f"--search has no effect: how fast {topology.name} is, is not known. Name TPUs or GPUs.")
    fitting, tried, least, refusal = [], 0, None, None
    placements = tuple(itertools.product(POLICIES, (False, True)))
    for mesh, accumulation in itertools.product(meshes(job, topology), divisors(job.train.global_batch_size)):
        fits_here = False
        for remat, moments_on_host in placements:
            if moments_on_host and fits_here:
                continue  # it would do the same, and fetch them besides
            train = dataclasses.replace(
                job.train, accumulation=accumulation, remat=remat, moments_on_host=moments_on_host
            )
            changed = dataclasses.replace(job, mesh=mesh, train=train)
            try:
                setup = make_setup(changed, topology)
                estimate = peak(stages(setup)).bytes
            except InputError as error:
                refusal = refusal or error
                break  # what is refused does not depend on the policy
            if (missing := unaccounted(setup)) is not None:
                raise InputError(
                    f"--search cannot tell what fits: the estimate has no account of {missing}. Plan one mesh at a "
                    "time, with --compile."
                )
            tried += 1
            seconds = bound(cost(setup, mesh, topology), topology)
            assert seconds is not None
            candidate = Candidate(changed, estimate, seconds)
            fits_here = estimate * (1 + MARGIN) <= machine.program_memory
            if fits_here:
                fitting.append(candidate)
            elif least is None or estimate < least.estimate_bytes:
                least = candidate
    if not tried:
        raise InputError(f"no mesh of {topology.name} can carry out this run; the first refusal was: {refusal}")
    best = min((found.bound.predicted for found in fitting), default=1.0)

    def order(found: Candidate) -> tuple[float, float, int]:
        sent = found.bound.links + found.bound.network
        return round(found.bound.predicted / best, 2), sent, found.estimate_bytes

    return Found(sorted(fitting, key=order), tried, least)


COMPILED = 3
"""Of the ranking that are compiled, at most, before it is said that none fits."""


def chosen(job: Job, topology_name: str, *, compiles: bool, lists_arrays: bool = False) -> tuple[Found, Plan]:
    """What a search found, and the plan of its first; with ``compiles``, of the first that the compiler takes.

    Those before it are then no longer in the ranking. Raises InputError where none fits.
    """
    topology = parse_topology(topology_name)
    if compiles:
        topology_devices(topology_name)
    found = search(job, topology)
    if not found.fitting:
        assert found.least is not None
        assert topology.machine is not None
        larger = smallest_that_fits(job, topology)
        where = "none fits" if larger is None else f"the smallest on which one fits is {larger}"
        raise InputError(
            f"none of the {found.tried} ways to carry out this run fits {topology_name}: the smallest needs "
            f"{gib(found.least.estimate_bytes)} GiB a device, of {gib(topology.machine.program_memory)}, with "
            f"{found.least.overrides}. With this batch, of the larger ones that were tried, {where}."
        )
    refusals = []
    for i, candidate in enumerate(found.fitting[: COMPILED if compiles else 1]):
        try:
            plan = make_plan(candidate.job, topology_name, compiles=compiles, lists_arrays=lists_arrays)
        except InputError as error:  # a mesh that does not follow the links, or a step that does not fit after all
            refusals.append(str(error))
            continue
        if plan.fits or not compiles:
            return dataclasses.replace(found, fitting=found.fitting[i:]), plan
        refusals.append("the compiled step does not fit")
    raise InputError(f"the compiler took none of the best {len(refusals)}: {'; '.join(refusals)}")


LARGER = 64
"""By how much more devices a topology is looked for on which a run fits."""


def smallest_that_fits(job: Job, topology: Topology) -> str | None:
    """Of the topology's generation, larger slices, then several of the largest; None up to LARGER.

    Of several there are powers of two, and half as many again: few batches divide by other numbers.
    """
    machine = topology.machine
    assert machine is not None
    shapes = {math.prod(shape): shape for shape in reversed(machine.shapes)}  # of as many chips, the most even one last
    names = [f"{topology.generation}:{sizes_text(shape)}" for _, shape in sorted(shapes.items())]
    names += [f"{count}x{names[-1]}" for count in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)]
    devices = topology.num_devices
    for larger in map(parse_topology, names):
        if not devices < larger.num_devices <= LARGER * topology.num_devices:
            continue
        devices = larger.num_devices
        with contextlib.suppress(InputError):  # a batch that does not divide
            if search(job, larger).fitting:
                return larger.name
    return None


def meshes(job: Job, topology: Topology) -> Iterator[MeshConfig]:
    """Every way to split the devices over the axes, and data and fsdp over the network."""
    has_experts = job.model.moe is not None
    for tensor in divisors(topology.slice_devices):
        for expert in divisors(topology.slice_devices // tensor) if has_experts else (1,):
            rest = topology.num_devices // tensor // expert
            for data, dcn_data in itertools.product(divisors(rest), divisors(topology.slices)):
                fsdp, dcn_fsdp = rest // data, topology.slices // dcn_data
                if data % dcn_data == 0 and fsdp % dcn_fsdp == 0:
                    parts = {"dcn_data": dcn_data, "dcn_fsdp": dcn_fsdp}
                    yield MeshConfig(data=data, fsdp=fsdp, expert=expert, tensor=tensor, **parts)


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
