"""``lmjax plan``."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from lmjax.cli.plan import _compiler_lines, _executable, plan
from lmjax.config import load
from lmjax.errors import InputError
from lmjax.plan.plan import MARGIN
from lmjax.plan.words import gib

pytestmark = pytest.mark.fast

CONFIG = """\
run_dir: runs/none
model: {vocab_size: 4096, max_length: 2048, embed_dim: 512, num_layers: 4, num_heads: 8, mlp_dim: 1536}
tokenizer: {kind: bytes}
data: {path: data/none, sources: [{kind: stdlib}], sequence_length: 1024}
train: {steps: 100, global_batch_size: 16}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(CONFIG)
    return str(file)


def planned(capsys, *arguments, **options) -> dict:
    plan(*arguments, **options, as_json=True)
    return json.loads(capsys.readouterr().out)


def test_json_has_what_is_promised(config: str, capsys):
    found = planned(capsys, config, topology="v5e:2x4")
    assert found["topology"] == "v5e:2x4"
    assert found["devices"] == 8
    assert found["parameters"] == 2 * 4096 * 512 + 512 + 4 * (4 * 512 * 512 + 3 * 512 * 1536 + 2 * 512)
    assert found["estimate_bytes"] == sum(array["bytes"] for array in found["arrays"])
    assert found["estimate_bytes"] == max(stage["bytes"] for stage in found["stages"])
    assert all(stage["bytes"] == sum(stage["by_kind"].values()) for stage in found["stages"])
    assert found["fits"] is True
    assert 0 < found["mfu_bound"] <= 1
    assert found["tokens_per_second_bound"] == pytest.approx(16 * 1024 / found["step_seconds_bound"])
    parts = found["bounds"]
    assert found["step_seconds_bound"] == max(parts[name] for name in ("compute", "memory", "links", "network"))
    assert found["step_seconds_predicted"] >= found["step_seconds_bound"]
    assert "compiled_bytes" not in found
    assert not Path("runs/none").exists()


def test_a_price_gives_what_the_run_costs_at_least(config: str, capsys):
    found = planned(capsys, config, topology="v5e:2x4", price=1.2)
    assert found["run_cost_bound"] == pytest.approx(100 * found["step_seconds_bound"] / 3600 * 8 * 1.2)


def test_what_does_not_fit_is_said_not_to(config: str, capsys):
    many = ["train.global_batch_size=16384"]
    found = planned(capsys, config, many, topology="v5e:2x4")
    assert found["fits"] is False
    plan(config, many, topology="v5e:2x4")
    assert "does not fit" in capsys.readouterr().out


def test_an_estimate_fits_with_its_margin_only(config: str, capsys):
    estimates = [
        planned(capsys, config, [f"train.global_batch_size={rows}"], topology="v5e:2x4")["estimate_bytes"]
        for rows in (800, 1600)
    ]
    a_row = (estimates[1] - estimates[0]) / 800
    fits = []
    for share in (0.87, 0.92, 1.05):
        rows = round((share * 15.75 * 2**30 - estimates[0]) / a_row + 800) // 8 * 8
        found = planned(capsys, config, [f"train.global_batch_size={rows}"], topology="v5e:2x4")
        assert found["estimate_bytes"] / found["device_bytes"] == pytest.approx(share, abs=0.01)
        fits.append(found["fits"])
    assert 0.87 < 1 / (1 + MARGIN) < 0.92
    assert fits == [True, False, False]


def test_cpus_have_no_speed_and_no_memory_of_their_own(config: str, capsys):
    found = planned(capsys, config, topology="cpu:8")
    assert found["fits"] is None
    assert found["step_seconds_bound"] is None
    plan(config, topology="cpu:8")
    assert "not known for CPUs" in capsys.readouterr().out


def test_what_the_estimate_has_no_account_of_is_left_to_the_compiler(config: str, capsys):
    scores = ["train.attention_kernel=reference"]
    assert planned(capsys, config, scores, topology="v5e:2x4")["fits"] is None
    plan(config, scores, topology="v5e:2x4")
    assert "for --compile to say" in capsys.readouterr().out
    assert planned(capsys, config, scores, topology="h200:8")["fits"] is True
    with pytest.raises(InputError, match="no account of attention that has all scores"):
        plan(config, scores, topology="v5e:2x4", searches=True)


def test_tables_show_the_same(config: str, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    plan(config, ["mesh.tensor=2"], topology="h200:8", price=3.0)
    shown = capsys.readouterr().out
    for part in (
        "moments of AdamW",
        "fsdp 4 x tensor 2",
        "NVLink",
        "fits with a margin of 12%",
        "% MFU",
        "the run",
    ):
        assert part in shown


def test_moments_on_the_hosts_are_told(config: str, capsys):
    here = planned(capsys, config, topology="v5e:2x4")
    there = planned(capsys, config, ["train.moments_on_host=true"], topology="v5e:2x4")
    assert here["host_bytes"] == 0
    assert there["host_bytes"] == here["stages"][-1]["by_kind"]["moments"]
    assert there["bounds"]["host"] > here["bounds"]["host"] == 0
    plan(config, ["train.moments_on_host=true"], topology="v5e:2x4")
    shown = capsys.readouterr().out
    assert f"on the hosts: {gib(there['host_bytes'])} GiB for each device" in shown
    assert f"host's memory {there['bounds']['host']:.4g} s" in shown


def test_what_the_docs_say_fits_with_the_moments_on_the_hosts_does_so_alone(config: str, capsys, tmp_path: Path):
    model = Path(__file__).parents[2] / "configs" / "models" / "llama3_8b.yaml"
    eight = tmp_path / "eight.yaml"
    eight.write_text(
        f"base: {model}\nrun_dir: runs/eight\ntokenizer: {{kind: bytes}}\n"
        "data: {path: data/eight, sources: [{kind: stdlib}], sequence_length: 8192}\nmesh: {fsdp: 16}\n"
        "train: {steps: 1, global_batch_size: 16, remat: {policy: attention}}\n"
    )
    fits = [
        planned(capsys, str(eight), [f"train.moments_on_host={value}"], topology="v5e:4x4")["fits"]
        for value in ("true", "false")
    ]
    assert fits == [True, False]


def test_a_search_is_ranked_and_written_as_a_config_to_train_by(config: str, capsys, tmp_path: Path):
    file = str(tmp_path / "found.yaml")
    found = planned(capsys, config, ["train.steps=7"], topology="v5e:2x4", searches=True, write=file)
    ranking = found["search"]["ranking"]
    assert len(ranking) == min(10, found["search"]["fitting"])
    assert found["search"]["tried"] >= found["search"]["fitting"]
    again = planned(capsys, file, topology="v5e:2x4", price=1.0)
    assert again["estimate_bytes"] == found["estimate_bytes"] == ranking[0]["estimate_bytes"]
    assert again["step_seconds_predicted"] == ranking[0]["step_seconds_predicted"]
    assert again["run_cost_bound"] == pytest.approx(7 * again["step_cost_bound"])
    with pytest.raises(InputError, match="is there already"):
        plan(config, topology="v5e:2x4", searches=True, write=file)
    plan(config, topology="v5e:2x4", searches=True)
    assert f"of {found['search']['tried']:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("base", "overrides"),
    [
        ("train: {remat: {policy: save, save: [query]}}", []),
        ("mesh: {data: 2, dcn_data: 2}", []),
        ("train: {xla_flags: {xla_a: 1}}", ["train.xla_flags={xla_b: 3}"]),
        ("", ["data.sources[0]={kind: files, path: other}"]),
        ("", ["train.moments_on_host=true"]),
    ],
    ids=str,
)
def test_what_is_written_is_the_whole_config(base: str, overrides: list[str], config: str, capsys, tmp_path: Path):
    """Nothing comes back of what the search, or an override, has put another value in the place of."""
    mine = tmp_path / "a: b #1.yaml"
    mine.write_text(f"base: {config}\n{base}")
    written = str(tmp_path / "found.yaml")
    found = planned(capsys, str(mine), overrides, topology="v5e:2x4", searches=True, write=written)
    before, after = load(str(mine), overrides), load(written)
    assert after.train == dataclasses.replace(
        before.train,
        accumulation=after.train.accumulation,
        remat=after.train.remat,
        moments_on_host=after.train.moments_on_host,
    )
    assert dataclasses.replace(after, mesh=before.mesh, train=before.train) == before
    again = planned(capsys, written, topology="v5e:2x4")
    assert again["step_seconds_predicted"] == found["step_seconds_predicted"]
    assert again["arrays"] == found["arrays"]


def test_values_that_are_offloaded_are_left_to_the_compiler(config: str, capsys):
    offloaded = ["train.remat={policy: save, offload: [query, mlp_up]}"]
    found = planned(capsys, config, offloaded, topology="h200:8")
    assert found["fits"] is None
    assert found["host_bytes"] == 2 * 2 * 1024 * 4 * (512 + 1536)  # of 2 rows a device and 4 blocks, two bytes each


def test_of_a_chip_with_two_devices_the_price_is_said_to_be_of_one(config: str, capsys):
    plan(config, topology="tpu7x:2x2x1", price=6.0)
    assert "of which a chip has 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ([], {"topology": ""}, "--topology is missing"),
        ([], {"topology": "v5q:2x2"}, "near it are v5"),
        ([], {"topology": "v5e:3x3"}, "does not come in 3x3"),
        (["mesh.fsdp=3"], {"topology": "v5e:2x4"}, "mesh: data 1 x fsdp 3"),
        (["mesh.tensor=16", "mesh.fsdp=1"], {"topology": "v5e:4x4"}, "heads has size 8"),
        (["train.global_batch_size=12"], {"topology": "v5e:2x4"}, "12 mod 8 = 4"),
        ([], {"topology": "2xv5e:2x4"}, "Set mesh.dcn_data=2"),
        (["mesh.dcn_data=2", "mesh.data=2"], {"topology": "v5e:2x4"}, "has 1 slice"),
        (["train.attention_kernel=splash"], {"topology": "h200:8"}, "'splash' runs on tpu only"),
        ([], {"topology": "cpu:8", "price": 1.0}, "--price has no effect"),
        ([], {"topology": "v5e:2x4", "price": -1.0}, "--price is -1.0"),
        ([], {"topology": "v5e:2x4", "price": math.nan}, "--price is nan"),
        ([], {"topology": "v5e:2x4", "price": math.inf}, "--price is inf"),
        (["optimizer.warmup_steps=200"], {"topology": "v5e:2x4"}, "below optimizer.warmup_steps 200"),
        (["logging.profile_steps=[5,2000]"], {"topology": "v5e:2x4"}, "goes beyond the last update"),
        (["train.xla_flags.xla_none=null"], {"topology": "v5e:2x4"}, "xla_none is null"),
        ([], {"topology": "v5e:2x4", "searches": True, "write": "none/x.yaml"}, "no directory none"),
        ([], {"topology": "v5e:2x4", "report": "none/x.html"}, "no directory none"),
        ([], {"topology": "v5e:2x4", "report": "."}, "--report .: is a directory"),
        ([], {"topology": "v5e:2x4", "searches": True, "write": "x", "report": "./x"}, "name the same file"),
        ([], {"topology": "v5e:2x4", "compiles": True, "executable": "none/step"}, "no directory none"),
        ([], {"topology": "v5e:2x4", "write": "x.yaml"}, "--write is for what --search finds"),
        ([], {"topology": "cpu:8", "searches": True}, "--search has no effect"),
        ([], {"topology": "cpu:8", "executable": "step"}, "--executable is for what --compile makes"),
        ([], {"topology": "v5e:2x4", "executable": "step", "compiles": True, "searches": True}, "of one plan"),
        ([], {"topology": "v5e:2x4", "arrays": True}, "--arrays are those that --compile finds"),
        (["mesh.fsdp=32", "mesh.tensor=2"], {"topology": "v5p:4x4x4"}, "cannot be laid out"),
        (["train.moments_on_host=true"], {"topology": "cpu:8"}, "moments_on_host has no effect on CPUs"),
        (["train.xla_flags.xla_none=null"], {"topology": "cpu:8", "compiles": True}, "xla_none is null"),
        (["train.xla_flags.xla_none=true"], {"topology": "cpu:8", "compiles": True}, "refuses xla_none=True"),
    ],
)
def test_what_cannot_be_planned_is_refused(config: str, overrides: list[str], options: dict, message: str):
    with pytest.raises(InputError, match=message):
        plan(config, overrides, **options)


def test_an_executable_for_gpus_is_told_to_be_without_tuned_kernels():
    told = {platform: _compiler_lines({"executable": _executable("step", platform)}) for platform in ("gpu", "tpu")}
    assert [len(lines) for lines in told.values()] == [2, 1]
    assert "kernels are not tuned" in told["gpu"][1]
    assert "libtpu" in told["tpu"][0]


def test_no_file_is_overwritten(config: str, tmp_path: Path):
    file = tmp_path / "step"
    file.write_text("somebody's")
    with pytest.raises(InputError, match=r"--executable .*step: is there already"):
        plan(config, topology="cpu:8", compiles=True, executable=str(file))
    with pytest.raises(InputError, match=r"--write .*step: is there already"):
        plan(config, topology="v5e:2x4", searches=True, write=str(file))
    with pytest.raises(InputError, match=r"--report .*step: is there already"):
        plan(config, topology="v5e:2x4", report=str(file))
    assert file.read_text() == "somebody's"


def test_a_page_is_written_beside_what_is_printed(config: str, capsys, tmp_path: Path):
    file = tmp_path / "plan.html"
    found = planned(capsys, config, topology="v5e:2x4", report=str(file), searches=True, price=1.0)
    assert planned(capsys, config, topology="v5e:2x4", report=str(file), searches=True, price=1.0) == found
    page = file.read_text()
    assert f"{found['run_cost_bound']:,.2f} the run" in page
    assert f"The best of {found['search']['fitting']:,} that fit" in page


def test_compiler_flags_of_the_hardware_are_told(config: str, capsys):
    compiled = {"xla_flags": {"xla_x": 3}, "unknown_xla_flags": ["xla_y"], "kernel_memory": {"flash_dq": 3 * 2**20}}
    lines = _compiler_lines(compiled)
    assert lines[0] == "compiler flags: xla_x=3"
    assert "xla_y" in lines[1]
    assert lines[2] == "vector memory of kernels, in MiB: flash_dq 3.0"
    assert _compiler_lines(planned(capsys, config, topology="v5e:2x4")) == []


@pytest.mark.parametrize("as_json", [True, False])
def test_the_compilers_own_figures_stand_beside_the_estimate(config: str, capsys, as_json: bool):
    small = ["data.sequence_length=128", "model.num_layers=2", "train.loss_chunk_tokens=128"]
    plan(config, small, topology="cpu:8", compiles=True, as_json=as_json)
    shown = capsys.readouterr().out
    if as_json:
        found = json.loads(shown)
        assert found["compiled_bytes"] == pytest.approx(found["estimate_bytes"], rel=0.5)
        assert found["collectives"]
        assert {sent["axes"] for sent in found["sent"]} == {"fsdp"}
    else:
        assert "compiled: " in shown
        assert "% off" in shown


@pytest.mark.parametrize("as_json", [True, False])
def test_arrays_of_the_compiled_step_are_listed(config: str, capsys, as_json: bool):
    small = ["model.num_layers=1", "model.embed_dim=64", "model.mlp_dim=64", "data.sequence_length=64"]
    plan(config, small, topology="cpu:8", compiles=True, arrays=True, as_json=as_json)
    shown = capsys.readouterr().out
    if as_json:
        found = json.loads(shown)
        sizes = [array["bytes"] for array in found["compiled_arrays"]]
        assert sizes == sorted(sizes, reverse=True)
        assert sum(sizes) == pytest.approx(found["compiled_bytes"], rel=0.02)
    else:
        assert "state.params['embed']['table']" in shown
        assert "all others" in shown
