"""The account of a step's memory: exact where JAX decides, and near the compiler's figure."""

import dataclasses
import itertools
import json
import math
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import benchmarks.plan_accuracy
from benchmarks.compile_steps import CASES
from benchmarks.plan_accuracy import (
    GOAL,
    MODELS,
    POLICIES,
    TOPOLOGIES,
    Case,
    case_in,
    drawn,
    judged,
    recorded,
    row,
    summary,
)
from lmjax.mesh import AXES, MeshConfig, make_mesh
from lmjax.models.decoder import Execution
from lmjax.nn.moe import MoEConfig
from lmjax.ops.cross_entropy import LossOptions
from lmjax.optim import OptimizerConfig
from lmjax.plan.memory import peak, stages
from lmjax.plan.plan import COMPILERS, MARGIN, make_setup
from lmjax.plan.saved import saved_by_block
from lmjax.plan.share import Setup, Share
from lmjax.plan.topology import parse_topology
from lmjax.precision import PrecisionConfig
from lmjax.sharding import leaf_report
from lmjax.train.feed import abstract_batch
from lmjax.train.state import make_blueprint
from lmjax.train.step import make_step

MESHES = ({"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2})


def setup_of(case: Case) -> Setup:
    return make_setup(case.job, parse_topology(case.topology))


def case_of(model: str, policy: str = "full", **changes) -> Case:
    """Three rows a device of 2048 positions, on forced CPU devices."""
    case = Case(model=model, topology="cpu:8", rows=24, length=2048, policy=policy, compute="float32")
    return dataclasses.replace(case, **({"fsdp": 8} | changes))


@pytest.mark.fast
@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_parameters_and_moments_are_those_that_a_device_holds(model: str, mesh: dict[str, int]):
    blueprint = make_blueprint(MODELS[model], OptimizerConfig(), 10, make_mesh(MeshConfig(**mesh)))
    held = sum(leaf.bytes_per_device for leaf in leaf_report(blueprint.state))
    case = case_of(model, **({"fsdp": 1} | mesh))
    found = {array.kind: array.bytes for array in stages(setup_of(case))[-1].arrays}
    assert found["parameters"] + found["moments"] == held - 3 * 4  # less the step, here and twice in the optimizer


@pytest.mark.fast
def test_the_batch_is_that_which_a_device_holds():
    case = case_of("grouped", accumulation=4, rows=32)
    mesh = make_mesh(MeshConfig(fsdp=8))
    held = sum(leaf.bytes_per_device for leaf in leaf_report(abstract_batch(32, 2048, 4, mesh)._asdict()))
    (batch,) = (array for array in stages(setup_of(case))[-1].arrays if array.kind == "batch")
    assert batch.bytes == held


def stacked_bytes(case: Case) -> int:
    """Of one device, what the scans over layers stack for the backward pass, as JAX's trace of the step has it."""
    job = case.job
    mesh = make_mesh(job.mesh)
    blueprint = make_blueprint(job.model, job.optimizer, 10, mesh)
    execution = Execution(
        compute_dtype=job.precision.compute_dtype,
        remat=job.train.remat,
        hardware=parse_topology(case.topology).hardware,
        attention_kernel=job.train.attention_kernel,
    )
    step = make_step(blueprint, execution, LossOptions())
    with jax.set_mesh(mesh):
        traced = jax.make_jaxpr(step)(blueprint.state, abstract_batch(case.rows, case.length, 1, mesh))
    repeats = {segment.repeats for segment in job.model.segments}
    # The first scans of so many turns are forward; an output that has one dimension more than the carry is stacked.
    scans = [eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "scan" and not eqn.params["reverse"]]
    outputs = [out.aval for eqn in scans if eqn.params["length"] in repeats for out in eqn.outvars]
    stacked = [out for out in outputs if out.ndim and out.shape[0] in repeats and out.ndim > 2]
    return sum(shard_bytes(out, mesh) for out in stacked)


def shard_bytes(array, mesh) -> int:
    names = itertools.chain.from_iterable(
        (entry,) if isinstance(entry, str) else entry for entry in array.sharding.spec if entry is not None
    )
    return math.prod(array.shape) * array.dtype.itemsize // math.prod(mesh.shape[name] for name in names)


def accounted_bytes(case: Case) -> int:
    setup = setup_of(case)
    return sum(array.bytes for kind in setup.model.blocks for array in saved_by_block(Share(setup), kind))


SAVED = [
    pytest.param(case_of(model, policy, **mesh), id=f"{model}-{policy}-{'-'.join(mesh)}")
    for model, policy, mesh in itertools.product(MODELS, POLICIES, ({"fsdp": 8}, {"fsdp": 4, "tensor": 2}))
]


def needs_the_compilers_of_the_account() -> None:
    if tuple(map(int, jax.__version__.split(".")[:2])) < COMPILERS:
        pytest.skip(f"the account is of the compilers of JAX {'.'.join(map(str, COMPILERS))}")


def assert_saved_is_stacked(case: Case) -> None:
    """But for what has one number a token, of which there is more where everything is kept."""
    if case.policy == "none":  # JAX 0.10 keeps more of some activations
        needs_the_compilers_of_the_account()
    tolerance = 5e-3 if case.policy == "none" else 1e-3
    assert accounted_bytes(case) == pytest.approx(stacked_bytes(case), rel=tolerance)


@pytest.mark.parametrize("case", SAVED[::7])
def test_what_is_saved_is_what_jax_stacks(case: Case):
    assert_saved_is_stacked(case)


@pytest.mark.parametrize("model", ["grouped", "windowed"])
def test_what_is_saved_of_all_scores_is_what_jax_stacks(model: str):
    case = case_of(model, "none", topology="h200:8", length=512, kernel="reference")
    assert_saved_is_stacked(case)
    assert accounted_bytes(case) > 1.1 * accounted_bytes(dataclasses.replace(case, kernel="chunked"))


@pytest.mark.slow
@pytest.mark.parametrize("case", SAVED)
def test_what_is_saved_is_what_jax_stacks_whatever_the_policy(case: Case):
    assert_saved_is_stacked(case)


def test_another_policy_stacks_something_else():
    assert accounted_bytes(case_of("grouped", "heads")) != pytest.approx(
        stacked_bytes(case_of("grouped", "dots")), rel=0.01
    )


@pytest.mark.fast
@pytest.mark.parametrize("topology", ["cpu:8", "v5p:2x2x2", "h200:8"])
def test_each_stage_names_what_it_holds(topology: str):
    for model, policy in itertools.product(MODELS, POLICIES):
        found = stages(setup_of(case_of(model, policy, topology=topology, compute="bfloat16")))
        assert len({stage.name for stage in found}) == len(found)
        for stage in found:
            assert stage.bytes == sum(array.bytes for array in stage.arrays)
            assert all(array.bytes > 0 and isinstance(array.bytes, int) for array in stage.arrays)


@pytest.mark.fast
def test_memory_grows_with_rows_and_shrinks_with_shards():
    peaks = [peak(stages(setup_of(case_of("grouped", rows=rows)))).bytes for rows in (8, 24, 48)]
    assert peaks == sorted(set(peaks))
    spread = [peak(stages(setup_of(case_of("grouped", fsdp=fsdp, data=8 // fsdp)))).bytes for fsdp in (8, 4, 2)]
    assert spread == sorted(set(spread))


@pytest.mark.fast
def test_slots_of_experts_count_by_the_capacity():
    model = dataclasses.replace(
        MODELS["experts"], moe=MoEConfig(num_experts=8, experts_per_token=2, capacity_factor=1.25)
    )
    setup = dataclasses.replace(setup_of(case_of("experts", fsdp=2, expert=4)), model=model)
    assert Share(setup).expert_rows == 8 * 3 * math.ceil(1.25 * 2048 * 2 / 8)
    assert Share(setup_of(case_of("experts", fsdp=2, expert=4))).expert_rows == 4 * 3 * 2048 * 2


RECORD = Path(benchmarks.plan_accuracy.__file__).parent / "results" / "plan_accuracy.jsonl"


@pytest.mark.fast
def test_what_compilers_said_is_near_what_is_estimated_today():
    rows = recorded(RECORD)
    assert len(rows) >= 60
    assert {found["model"] for found in rows} == set(MODELS)
    assert {found["policy"] for found in rows} == set(POLICIES)
    assert {found["topology"] for found in rows} >= set(itertools.chain(*TOPOLOGIES.values()))
    found = summary(rows)
    assert found["mean_error"] < GOAL["mean"]
    assert found["worst_error"] < GOAL["worst"] == MARGIN
    # Another estimate, of what a device would hold with twice the positions, is far from it.
    case = case_in(rows[0])
    longer = dataclasses.replace(case, length=case.length * 2)
    assert abs(judged(longer, rows[0]["compiled_bytes"])["error"]) > 2 * GOAL["worst"]


def published_error(model: str, kernel: str) -> float:
    """Of the estimate for a published model's step, beside what a compiler said."""
    published = CASES[model]
    (found,) = (
        row
        for line in (RECORD.parent / "compile_steps.jsonl").read_text().splitlines()
        if (row := json.loads(line))["model"] == model and row.get("attention_kernel", "auto") == kernel
    )
    case = case_of("grouped", rows=published.rows, length=published.length, topology=published.topology, kernel=kernel)
    job = dataclasses.replace(case.job, model=published.model, mesh=published.mesh, precision=PrecisionConfig())
    estimate = peak(stages(make_setup(job, parse_topology(published.topology)))).bytes
    return estimate / (found["total_gib"] * 2**30) - 1


@pytest.mark.fast
@pytest.mark.parametrize("model", ["llama3_8b", "mistral_7b", "mpt_7b"])
def test_steps_of_published_models_are_near_too(model: str):
    assert abs(published_error(model, "flash_tpu")) < 0.04
    assert abs(published_error(f"{model}_h200", "flash_hopper")) < 0.04


@pytest.mark.fast
@pytest.mark.parametrize("model", ["mixtral_8x7b_h200", "deepseek_v3"])
def test_steps_of_published_models_with_experts_are_near_too(model: str):
    assert abs(published_error(model, "auto")) < 0.04


@pytest.mark.fast
@pytest.mark.parametrize(
    ("model", "kernel", "error"), [("gemma2_9b", "flash_tpu", -0.20), ("mixtral_8x7b", "auto", -0.06)]
)
def test_published_models_that_are_said_to_be_further_off(model: str, kernel: str, error: float):
    assert published_error(model, kernel) == pytest.approx(error, abs=0.03)


def assert_near(case: Case) -> None:
    needs_the_compilers_of_the_account()
    found = row(case)
    assert abs(found["error"]) < GOAL["worst"], found


@pytest.mark.parametrize("case", list(itertools.islice(drawn("cpu", 0), 3)), ids=str)
def test_the_estimate_is_near_the_compilers_figure(case: Case):
    assert_near(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(itertools.islice(drawn("cpu", 0), 3, 12)), ids=str)
def test_the_estimate_is_near_the_compilers_figure_on_cpus(case: Case):
    assert_near(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(itertools.islice(drawn("tpu", 0), 2)), ids=str)
def test_the_estimate_is_near_the_compilers_figure_on_tpus(case: Case):
    pytest.importorskip("libtpu")
    assert_near(case)


@pytest.mark.proof
@pytest.mark.parametrize("case", list(itertools.islice(drawn("tpu", 0), 2, 20)), ids=str)
def test_the_estimate_is_near_the_compilers_figure_on_many_tpus(case: Case):
    pytest.importorskip("libtpu")
    assert_near(case)


@pytest.mark.proof
@pytest.mark.parametrize("case", list(itertools.islice(drawn("gpu", 0), 20)), ids=str)
def test_the_estimate_is_near_the_compilers_figure_on_h200(case: Case):
    pytest.importorskip("jax_plugins.xla_cuda13")
    assert_near(case)


SEED = time.time_ns() if "PYTEST_XDIST_TESTRUNUID" not in os.environ else os.environ["PYTEST_XDIST_TESTRUNUID"]
"""Another one each time, the same in all workers of a run."""


@pytest.mark.proof
@pytest.mark.parametrize("case", list(itertools.islice(drawn("tpu", SEED), 6)), ids=range(6))
def test_a_case_that_nobody_has_seen(case: Case):
    """A quarter of what is compiled for TPU. Told, and not judged: that the account was not made to fit a list."""
    pytest.importorskip("libtpu")
    found = row(case)
    print(json.dumps(found))
    assert found["compiled_bytes"] > 0


@pytest.mark.fast
def test_a_model_of_another_shape_has_another_estimate():
    wider = dataclasses.replace(MODELS["grouped"], mlp_dim=2 * MODELS["grouped"].mlp_dim)
    setup = setup_of(case_of("grouped"))
    assert peak(stages(dataclasses.replace(setup, model=wider))).bytes > 1.2 * peak(stages(setup)).bytes
    assert set(setup.sizes) == set(AXES)
    assert jnp.dtype("float32").itemsize == setup.compute_bytes
