"""The page of a plan: everything is in it, bars are as long as bytes, and squares are the devices of the mesh."""

import collections
import re
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.cli.run_directory import to_job
from lmjax.config import load
from lmjax.errors import InputError
from lmjax.mesh import AXES, BATCH_AXES, MeshConfig, make_mesh
from lmjax.plan.picture import KINDS, bound_bars, facts, render, stage_bars, write_plan
from lmjax.plan.picture_mesh import axis_rows, explanation, layout, places
from lmjax.plan.plan import as_json, make_plan
from lmjax.plan.saved import Kind
from lmjax.plan.topology import topology_devices
from lmjax.sharding import parameter_spec

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]


def found_for(topology: str, *overrides: str, config: str = "configs/quickstart.yaml") -> dict[str, Any]:
    changes = ["train.global_batch_size=64", *overrides]
    return as_json(make_plan(to_job(load(str(ROOT / config), changes)), topology))


PLANS = {
    "slice": ("v5e:2x4", "mesh.fsdp=4", "mesh.tensor=2", "model.num_heads=4", "model.embed_dim=128"),
    "slices": ("2xv5p:2x2x2", "mesh.data=2", "mesh.dcn_data=2", "mesh.fsdp=8"),
    "parts of fsdp": ("4xv5p:2x2x1", "mesh.fsdp=16", "mesh.dcn_fsdp=4"),
    "hosts": ("2xh200:8", "mesh.data=2", "mesh.fsdp=8"),
    "one": ("h100:1",),
    "cpus": ("cpu:8",),
}


@pytest.fixture(params=PLANS)
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    return found_for(*PLANS[request.param])


def test_the_page_is_whole_and_needs_nothing_else(found: dict[str, Any]):
    page = render(found)
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page
    for array in found["arrays"]:
        assert array["name"].replace("'", "&#x27;") in page
    for stage in found["stages"]:
        assert stage["name"] in [bar.name for bar in stage_bars(found)]
    for row in found["traffic"]:
        assert f"<td>{row['axis']}</td><td>{row['what']}</td>" in page
    assert f"{found['parameters']:,}" in page
    assert page == render(found)


def test_a_bar_is_as_long_as_the_bytes_of_its_stage(found: dict[str, Any]):
    bars = stage_bars(found)
    assert [bar.end for bar in bars] == [stage["bytes"] for stage in found["stages"]]
    assert max(bar.end for bar in bars) == found["estimate_bytes"]
    for bar in bars:
        ends = [0, *(segment.start + segment.length for segment in bar.segments)]
        assert [segment.start for segment in bar.segments] == ends[:-1]
        assert all(segment.length > 0 for segment in bar.segments)


def test_every_kind_of_array_has_a_colour_of_its_own():
    assert set(KINDS) == set(get_args(Kind))
    assert len({colour for colour, _ in KINDS.values()}) == len(KINDS)


MESHES = ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"data": 2, "expert": 4})


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_squares_have_the_same_number_where_jax_puts_the_same_part(sizes: dict[str, int]):
    config = MeshConfig(**{"fsdp": 1, **sizes})
    mesh = make_mesh(config, jax.devices()[:8])
    it = layout({"topology": "cpu:8", "mesh": dict(mesh.shape), "dcn": {"data": 1, "fsdp": 1}})
    shape = (64, 64)
    specs = {"parameters": parameter_spec(("embed", "mlp"), shape, mesh.shape), "sequences": PartitionSpec(BATCH_AXES)}
    for what, spec in specs.items():
        parts = NamedSharding(mesh, spec).devices_indices_map(shape)
        ours = [getattr(cell, what) for cell in it.cells]
        theirs = [str(parts[device]) for device in mesh.devices.flat]
        assert all(first == last for first, last in ours)
        assert np.array_equal(np.equal.outer(theirs, theirs), [[a == b for b in ours] for a in ours])


def test_gaps_are_between_whole_turns_of_the_last_axis(found: dict[str, Any]):
    it = layout(found)
    assert it.columns % it.turn == 0
    turns = collections.defaultdict(set)
    for cell in it.cells:
        turns[cell.slice, cell.row, cell.column // it.turn].add(cell.sequences)
    if found["mesh"]["tensor"] > 1:
        assert all(len(sequences) == 1 for sequences in turns.values())  # that tensor does not split


def test_every_device_is_a_square_or_in_one(found: dict[str, Any]):
    it = layout(found)
    assert it.drawn == it.slices
    assert sum(cell.devices for cell in it.cells) == found["devices"]
    assert len({(cell.slice, cell.row, cell.column) for cell in it.cells}) == len(it.cells)
    parts = collections.Counter(cell.parameters for cell in it.cells)
    assert len(parts) == found["devices"] // found["mesh"]["data"]
    assert set(parts.values()) == {found["mesh"]["data"]}


def test_many_devices_are_drawn_together_and_far_slices_not_at_all():
    mesh = ("mesh.data=4", "mesh.dcn_data=4", "mesh.fsdp=512")
    found = found_for(
        "4xv5p:8x8x8",
        *mesh,
        "train.global_batch_size=2048",
        "model.embed_dim=1024",
        "model.head_dim=64",
        "model.num_heads=16",
    )
    it = layout(found)
    assert (it.slices, it.devices_a_cell) == (4, 2)
    assert "A square is 2 devices" in explanation(found)
    assert f"the first {it.drawn} of 4 slices" in explanation(found)


@pytest.mark.parametrize("name", ["slice", "slices", "parts of fsdp"])
def test_slices_have_the_devices_that_the_run_gives_them(name: str):
    pytest.importorskip("libtpu")
    found = found_for(*PLANS[name])
    config = MeshConfig(**found["mesh"], **{f"dcn_{axis}": parts for axis, parts in found["dcn"].items()})
    devices = make_mesh(config, topology_devices(found["topology"])).devices.flatten()
    for number, members in enumerate(places(found)):
        assert {getattr(devices[member], "slice_index", 0) for member in members} == {number}


def test_axes_name_the_links_that_they_go_over():
    rows = axis_rows(found_for(*PLANS["slices"]))
    assert [(row[0], row[2], row[4]) for row in rows] == [("data", "2 x 1", "DCN"), ("fsdp", "1 x 8", "ICI")]
    assert axis_rows(found_for(*PLANS["one"])) == []


def test_one_that_does_not_fit_is_said_not_to():
    found = found_for("v5e:2x4", "train.global_batch_size=65536")
    assert found["fits"] is False
    assert dict(facts(found))["fits"].startswith("no, with a margin of 12%")
    assert max(bar.end for bar in stage_bars(found)) > found["device_bytes"]
    assert dict(facts(found_for("v5e:2x4")))["fits"].startswith("yes")


def test_the_compilers_figure_stands_beside_the_estimate():
    found = found_for("v5e:2x4")
    compiled = {**found, "compiled_bytes": 2 * found["estimate_bytes"]}
    told = dict(facts(compiled))
    assert "-50.0% off" in told["memory of a device, as compiled"]
    assert told["fits"].startswith("yes, as compiled")
    assert render(compiled) != render(found)


def test_cpus_have_no_speed_and_others_every_part_of_it():
    cpus, slices = found_for("cpu:8"), found_for(*PLANS["slices"])
    assert "Time of a step" not in render(cpus)
    assert dict(facts(cpus))["speed"] == "not known for CPUs"
    bars, bounds = dict(bound_bars(slices)), slices["bounds"]
    assert bounds["host"] == 0
    assert list(bars.values()) == [seconds for part, seconds in bounds.items() if part != "host"]
    hosts = dict(bound_bars(slices | {"bounds": bounds | {"host": 0.125}}))
    assert hosts == bars | {"host's memory (PCIe)": 0.125}


def test_text_is_no_markup(tmp_path: Path):
    found = found_for("v5e:2x4")
    found["arrays"][0]["name"] = "<b>saved</b> & more"
    page = render(found)
    assert "<b>saved" not in page
    assert "&lt;b&gt;saved&lt;/b&gt; &amp; more" in page


def test_a_search_is_in_it_and_a_directory_that_is_not_there_is_refused(tmp_path: Path):
    found = found_for("v5e:2x4")
    row = {
        "mesh": dict.fromkeys(AXES, 1) | {"fsdp": 8},
        "train": {
            "accumulation": 4,
            "remat": {"policy": "save", "save": ["query"]},
            "moments_on_host": True,
        },
        "estimate_bytes": 2**30,
        "step_seconds_predicted": 0.125,
        "step_seconds_bound": 0.0625,
    }
    found["search"] = {"tried": 12, "fitting": 1, "ranking": [row]}
    file = tmp_path / "plan.html"
    write_plan(found, str(file))
    assert (
        "<td>0.125</td><td>0.0625</td><td>fsdp 8</td><td>save+query</td><td>4</td><td>hosts</td><td>1.00</td>"
        in file.read_text()
    )
    with pytest.raises(InputError, match="there is no directory .* or name another --report"):
        write_plan(found, str(tmp_path / "none" / "plan.html"))
