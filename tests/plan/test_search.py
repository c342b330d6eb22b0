"""Which mesh, policy and micro-batches a search takes."""

import dataclasses
import itertools
import math

import pytest

from benchmarks.plan_accuracy import MODELS, Case
from lmjax.errors import InputError
from lmjax.mesh import AXES
from lmjax.plan.plan import MARGIN
from lmjax.plan.search import POLICIES, chosen, divisors, meshes, search, smallest_that_fits
from lmjax.plan.topology import parse_topology

pytestmark = pytest.mark.fast

CASE = Case(model="grouped", topology="v5e:2x4", fsdp=8, rows=64, length=4096, policy="full")


def test_every_mesh_of_the_devices_is_gone_through():
    found = [tuple(getattr(mesh, axis) for axis in AXES) for mesh in meshes(CASE.job, parse_topology("v5e:2x4"))]
    assert len(found) == len(set(found)) == 10  # of 8 = 2^3, over three axes
    assert all(math.prod(sizes) == 8 for sizes in found)
    experts = Case(model="experts", topology="v5e:2x4", fsdp=8, rows=64, length=4096, policy="full")
    assert len(list(meshes(experts.job, parse_topology("v5e:2x4")))) == 20  # over four


def test_slices_are_joined_by_the_network_in_every_mesh():
    found = list(meshes(CASE.job, parse_topology("2xv5e:2x4")))
    assert all(mesh.dcn_data * mesh.dcn_fsdp == 2 for mesh in found)
    assert all(mesh.data % mesh.dcn_data == 0 and mesh.fsdp % mesh.dcn_fsdp == 0 for mesh in found)
    assert {mesh.dcn_data for mesh in found} == {1, 2}
    six = {(mesh.dcn_data, mesh.dcn_fsdp) for mesh in meshes(CASE.job, parse_topology("6xv5e:2x4"))}
    assert six == {(1, 6), (2, 3), (3, 2), (6, 1)}


def test_what_fits_is_ranked_by_its_predicted_time():
    topology = parse_topology(CASE.topology)
    found = search(CASE.job, topology)
    machine = topology.machine
    assert machine is not None
    assert all(candidate.estimate_bytes * (1 + MARGIN) <= machine.program_memory for candidate in found.fitting)
    seconds = [candidate.bound.predicted for candidate in found.fitting]
    assert all(before <= 1.01 * after for before, after in itertools.pairwise(seconds))
    assert 0 < len(found.fitting) < found.tried
    assert found.least is not None
    accumulations = {candidate.job.train.accumulation for candidate in found.fitting}
    assert accumulations <= set(divisors(64))
    assert {candidate.job.train.remat for candidate in found.fitting} == set(POLICIES)


def test_where_memory_is_short_more_is_computed_again():
    roomy, policies = chosen(CASE.job, "v5p:2x2x2", compiles=False)[1].setup.remat, list(POLICIES)
    short = chosen(dataclasses.replace(CASE, length=8192, model="tied", rows=8).job, "v5e:2x2", compiles=False)[1]
    assert roomy.policy == "none"
    assert policies.index(short.setup.remat) > policies.index(roomy)


def test_a_model_that_fits_nowhere_here_names_the_smallest_topology_that_would_do():
    wide = dataclasses.replace(MODELS["grouped"], embed_dim=8192, mlp_dim=28_672, num_heads=64, num_layers=80)
    job = dataclasses.replace(CASE.job, model=wide)
    with pytest.raises(
        InputError, match=r"fits v5e:2x4: the smallest needs .* on which one fits is v5e:\d+x\d+"
    ) as error:
        chosen(job, "v5e:2x4", compiles=False)
    larger = str(error.value).rpartition(" is ")[2].rstrip(".")
    assert chosen(job, larger, compiles=False)[1].fits
    # Half of it is too small.
    half = {"v5e:8x8": "v5e:4x8", "v5e:8x16": "v5e:8x8", "v5e:16x16": "v5e:8x16"}[larger]
    with pytest.raises(InputError, match="none of the"):
        chosen(job, half, compiles=False)


def test_the_smallest_topology_may_have_less_than_twice_the_devices():
    wide = dataclasses.replace(MODELS["grouped"], embed_dim=16_384, mlp_dim=53_248, num_heads=128, num_layers=126)
    job = dataclasses.replace(CASE.job, model=wide)
    needed = [smallest_that_fits(job, parse_topology(f"{hosts}xh200:8")) for hosts in (4, 5)]
    assert needed == ["8xh200:8", "8xh200:8"]


def test_cpus_are_refused():
    with pytest.raises(InputError, match="--search has no effect"):
        search(CASE.job, parse_topology("cpu:8"))


def test_a_run_that_no_mesh_can_carry_out_is_refused_with_the_first_reason():
    with pytest.raises(InputError, match="no mesh of h200:8 can carry out this run.* 8193 is above model.max_length"):
        search(dataclasses.replace(CASE, length=8193).job, parse_topology("h200:8"))


def test_the_compiler_is_asked_for_the_best_until_one_fits(monkeypatch):
    from lmjax.plan import search as module

    asked = []

    def refused_once(job, name, *, compiles, lists_arrays):
        asked.append(job)
        if len(asked) == 1:
            raise InputError("does not follow the links")
        assert lists_arrays
        return real(job, name, compiles=False)

    real = module.make_plan
    monkeypatch.setattr(module, "make_plan", refused_once)
    monkeypatch.setattr(module, "topology_devices", lambda name: ())
    found, plan = chosen(CASE.job, "v5e:2x4", compiles=True, lists_arrays=True)
    assert len(asked) == 2
    assert found.fitting[0].job == asked[1]
    assert plan.setup.remat == asked[1].train.remat

    def refused(job, name, *, compiles, lists_arrays):
        raise InputError("does not follow the links")

    monkeypatch.setattr(module, "make_plan", refused)
    with pytest.raises(InputError, match="took none of the best 3: does not follow"):
        chosen(CASE.job, "v5e:2x4", compiles=True)
