"""What a plan says of moments that are on the hosts, beside what the compilers make of them."""

import dataclasses
import itertools

import pytest

from benchmarks.plan_accuracy import Case, drawn
from lmjax.errors import InputError
from lmjax.mesh import MeshConfig
from lmjax.plan.cost import bound, cost
from lmjax.plan.memory import moments_bytes, stages
from lmjax.plan.plan import MARGIN, Plan, make_plan, make_setup
from lmjax.plan.search import chosen, search
from lmjax.plan.topology import parse_topology
from tests.plan.test_memory import needs_the_compilers_of_the_account

HERE = Case(model="grouped", topology="v5e:2x4", fsdp=8, rows=64, length=4096, policy="full")
TIGHT = dataclasses.replace(HERE, model="tied", topology="v5e:2x2", fsdp=4, rows=4, length=2048)


def on_host(case: Case) -> Case:
    return dataclasses.replace(case, moments_on_host=True)


@pytest.mark.fast
@pytest.mark.parametrize("topology", ["v5e:2x4", "h200:8"])
def test_moments_are_in_a_devices_memory_at_the_update_alone(topology: str):
    case = dataclasses.replace(HERE, topology=topology)
    setups = [make_setup(each.job, parse_topology(topology)) for each in (case, on_host(case))]
    moments = moments_bytes(setups[0])
    for here, there in zip(*map(stages, setups), strict=True):
        assert (here.name, here.bytes_by_kind["moments"]) == (there.name, moments)
        if there.name == "update":
            assert there.bytes_by_kind["moments"] == moments
            assert ("gradients" in there.bytes_by_kind) == (topology == "v5e:2x4")
        else:
            assert "moments" not in there.bytes_by_kind
            assert there.bytes == here.bytes - moments


@pytest.mark.fast
def test_they_come_over_the_hosts_link_and_nothing_hides_their_way():
    topology = parse_topology("v5p:2x2x2")
    here, there = (cost(make_setup(case.job, topology), MeshConfig(), topology) for case in (HERE, on_host(HERE)))
    added = [row for row in there.traffic if row not in here.traffic]
    moments = moments_bytes(make_setup(HERE.job, topology))
    assert [(row.axis, row.link, row.bytes) for row in added] == [("host", "PCIe", moments)]
    assert there.memory_bytes == here.memory_bytes + 2 * moments
    one, other = bound(here, topology), bound(there, topology)
    assert one is not None
    assert other is not None
    assert one.host == 0
    assert other.host == pytest.approx(moments / 15e9)
    assert (other.links, other.network, other.waited_for) == (one.links, one.network, one.waited_for)
    assert other.predicted == pytest.approx(other.compute + other.memory + other.waited_for + 2 * other.host)
    assert other.seconds == max(one.seconds, other.host, other.memory)


@pytest.mark.fast
def test_a_search_puts_them_there_where_they_do_not_fit_else():
    topology = parse_topology(HERE.topology)
    found = search(HERE.job, topology)
    places: dict[tuple, set[bool]] = {}
    for candidate in found.fitting:
        train = candidate.job.train
        key = (candidate.job.mesh, train.accumulation, train.remat)
        places.setdefault(key, set()).add(train.moments_on_host)
    assert set(map(len, places.values())) == {1}
    assert {False} in places.values()
    assert {True} in places.values()
    for (mesh, accumulation, remat), (moments_on_host,) in places.items():
        train = dataclasses.replace(HERE.job.train, accumulation=accumulation, remat=remat)
        plan = make_plan(dataclasses.replace(HERE.job, mesh=mesh, train=train), HERE.topology)
        assert plan.fits is not moments_on_host


@pytest.mark.fast
def test_a_run_that_fits_no_other_way_is_given_that_one():
    wide = dataclasses.replace(HERE.job.model, embed_dim=4096, num_heads=32, mlp_dim=14_336, num_layers=24)
    job = dataclasses.replace(HERE.job, model=wide)
    found, plan = chosen(job, "v5e:2x4", compiles=False)
    assert plan.fits
    assert plan.setup.moments_on_host
    assert found.fitting[0].overrides["train"]["moments_on_host"] is True
    assert all(candidate.job.train.moments_on_host for candidate in found.fitting)


@pytest.mark.fast
def test_what_gpus_could_not_load_is_not_compiled_for_them():
    case = on_host(dataclasses.replace(HERE, topology="h200:8"))
    with pytest.raises(InputError, match=r"Leave --executable or train\.moments_on_host out"):
        make_plan(case.job, case.topology, compiles=True, executable="step")


def compiled(case: Case) -> Plan:
    plan = make_plan(case.job, case.topology, compiles=True)
    assert plan.compiled is not None
    moments = moments_bytes(plan.setup) if case.moments_on_host else 0
    assert plan.compiled.host_bytes == pytest.approx(moments, rel=1e-4)  # TPUs fill up what is smaller than a tile
    return plan


def assert_moments_leave(case: Case, at_least: float) -> None:
    """By so much of them the compiled step needs less."""
    here, there = compiled(case), compiled(on_host(case))
    assert here.compiled is not None
    assert there.compiled is not None
    saved = here.compiled.total_bytes - there.compiled.total_bytes
    moments = moments_bytes(here.setup)
    assert at_least * moments < saved <= 1.001 * moments, (case, saved / moments)
    assert there.peak.bytes < here.peak.bytes


@pytest.mark.slow
def test_a_step_for_tpus_keeps_them_on_the_host():
    pytest.importorskip("libtpu")
    assert_moments_leave(TIGHT, 0.3)


@pytest.mark.proof
@pytest.mark.parametrize("case", list(itertools.islice(drawn("tpu", "host"), 2)), ids=str)
def test_steps_for_tpus_keep_most_of_them_on_the_host(case: Case):
    """Some are fetched early: there is memory to spare."""
    pytest.importorskip("libtpu")
    needs_the_compilers_of_the_account()
    assert_moments_leave(case, 0.3)


@pytest.mark.proof
def test_where_tpus_have_little_to_spare_less_is_fetched_early():
    pytest.importorskip("libtpu")
    needs_the_compilers_of_the_account()
    full = on_host(dataclasses.replace(TIGHT, rows=40, length=4096, policy="attention"))
    estimate = make_plan(full.job, full.topology)
    assert estimate.memory is not None
    assert 0.95 * estimate.memory < estimate.peak.bytes * (1 + MARGIN) <= estimate.memory
    plan = compiled(full)
    assert plan.compiled is not None
    assert plan.fits
    assert plan.peak.bytes == pytest.approx(plan.compiled.total_bytes, rel=0.05)


@pytest.mark.proof
@pytest.mark.parametrize("case", list(itertools.islice(drawn("gpu", "host"), 4)), ids=str)
def test_steps_for_gpus_are_near_the_estimate(case: Case):
    pytest.importorskip("jax_plugins.xla_cuda13")
    assert_moments_leave(case, 0.9)
    found = compiled(on_host(case))
    assert found.compiled is not None
    assert found.peak.bytes == pytest.approx(found.compiled.total_bytes, rel=0.12)
