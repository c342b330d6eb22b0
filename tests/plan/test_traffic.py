"""What devices receive, in closed form, beside what compiled steps send."""

import pytest

from benchmarks.plan_accuracy import Case
from lmjax.mesh import FSDP_AXES
from lmjax.plan.plan import as_json, make_plan

GROUPED = Case(model="grouped", topology="", fsdp=8, rows=16, length=2048, policy="full")


def both(topology: str, **changes) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by axis, those over which parameters are split together: by the plan and by the compiled step.

    What a router sends is left out where it decides how much that is.
    """
    values = {name: getattr(GROUPED, name) for name in ("model", "fsdp", "rows", "length", "policy")}
    case = Case(**values | {"topology": topology} | changes)
    found = as_json(make_plan(case.job, topology, compiles=True))
    planned: dict[str, int] = {}
    for row in found["traffic"]:
        if topology == "cpu:8" or not row["what"].startswith("tokens to experts"):
            axis = "fsdp" if row["axis"] in FSDP_AXES else row["axis"]
            planned[axis] = planned.get(axis, 0) + row["bytes"]
    sent: dict[str, int] = {}
    for row in found["sent"]:
        axes, kind = set(row["axes"].split("+")), row["kind"]
        if axes <= set(FSDP_AXES) and kind != "ragged-all-to-all":
            # On CPUs a sum that is split is a sum whose parts are thrown away, which sends twice as much.
            share = 0.5 if kind == "all-reduce" and topology == "cpu:8" else 1
            sent["fsdp"] = sent.get("fsdp", 0) + round(share * row["bytes"])
        elif len(axes) == 1:
            sent[row["axes"]] = sent.get(row["axes"], 0) + row["bytes"]
    return planned, sent


def assert_same(found: tuple[dict[str, int], dict[str, int]]) -> None:
    planned, sent = found
    assert planned.keys() <= sent.keys()
    for axis, num_bytes in planned.items():
        assert num_bytes == pytest.approx(sent[axis], rel=0.03), (axis, planned, sent)


def test_what_is_planned_is_what_a_compiled_step_sends():
    assert_same(both("cpu:8", compute="float32"))
    planned, _ = both("cpu:8", compute="float32", policy="none")
    _, sent = both("cpu:8", compute="float32", data=2, fsdp=4)
    assert planned["fsdp"] != pytest.approx(sent["fsdp"], rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"policy": "none", "data": 4, "fsdp": 2},
        {"model": "experts", "fsdp": 2, "expert": 4},
        {"model": "dense", "fsdp": 2, "data": 4, "policy": "dots"},
    ],
    ids=str,
)
def test_what_is_planned_is_what_compiled_steps_send_on_cpus(changes: dict):
    assert_same(both("cpu:8", compute="float32", **changes))


@pytest.mark.proof
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fsdp": 4, "tensor": 2},
        {"data": 2, "fsdp": 2, "tensor": 2, "policy": "none"},
        {"model": "tied", "data": 4, "fsdp": 2, "policy": "attention", "accumulation": 2},
        {"model": "experts", "fsdp": 2, "expert": 4},
        {"policy": "dots"},
        {"model": "latent", "policy": "heads"},
    ],
    ids=str,
)
def test_what_is_planned_is_what_compiled_steps_send_on_h200(changes: dict):
    pytest.importorskip("jax_plugins.xla_cuda13")
    assert_same(both("h200:8", **changes))


@pytest.mark.slow
def test_what_is_planned_is_what_a_compiled_step_sends_along_tensor_on_tpus():
    """Along fsdp their compilers pass on parts in rings, of which the program tells no groups."""
    pytest.importorskip("libtpu")
    planned, sent = both("v5p:2x2x2", fsdp=4, tensor=2)
    assert planned["tensor"] == pytest.approx(sent["tensor"], rel=0.03)
