"""The pretraining recipes: what their heads say is what is planned, and their steps compile for their topologies."""

import json
from pathlib import Path

import pytest

from benchmarks.recipes import RECIPES, heads, planned, topology
from lmjax.plan.topology import parse_topology

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "recipes.jsonl"
CHEAP = {"125m_v5e-8"}
PLATFORM = {file: parse_topology(topology(file)).hardware.platform for file in RECIPES}


def of_platform(platform: str) -> list[Path]:
    return [file for file in RECIPES if PLATFORM[file] == platform and file.stem not in CHEAP]


@pytest.mark.fast
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_head_of_a_recipe_says_what_is_planned(file: Path):
    lines = file.read_text().splitlines()
    job, plan = planned(file)
    for line in heads(job, plan):
        assert line in lines
    assert f"#   lmjax train configs/pretrain/{file.name}" in lines
    assert job.run_dir == f"runs/{file.stem}"
    assert plan.fits


@pytest.mark.fast
def test_every_recipe_was_compiled_and_fits():
    rows = [json.loads(line) for line in RECORD.read_text().splitlines()]
    assert [row["recipe"] for row in rows] == [file.stem for file in RECIPES]
    for file, row in zip(RECIPES, rows, strict=True):
        assert row["topology"] == topology(file)
        assert row["fits"]
        assert row["compiled_bytes"] <= row["device_bytes"]
        assert row["estimate_bytes"] == planned(file)[1].peak.bytes
        error = row["estimate_bytes"] / row["compiled_bytes"] - 1
        assert abs(error) < (0.07 if file.stem.startswith("mixtral") else 0.04)


@pytest.mark.fast
def test_there_is_one_for_each_size_and_machine():
    jobs = {file.stem: planned(file)[0] for file in RECIPES}
    assert {name.split("_")[0] for name in jobs} == {"125m", "1b", "3b", "8b", "70b", "switch", "mixtral"}
    wanted = {"v5e:16x16", "v5p:2x4x4", "v5p:4x8x8", "v6e:16x16", "h100:8", "h200:8", "32xh200:8", "v5e:2x4"}
    assert {topology(file) for file in RECIPES} >= wanted


def assert_compiles(file: Path) -> None:
    _, plan = planned(file, compiles=True)
    assert plan.compiled is not None
    assert plan.fits, f"{plan.compiled.total_bytes:,} bytes of {plan.memory:,}"


@pytest.mark.slow
@pytest.mark.parametrize("file", [file for file in RECIPES if file.stem in CHEAP], ids=lambda file: file.stem)
def test_a_small_recipe_compiles(file: Path):
    pytest.importorskip("libtpu")
    assert_compiles(file)


@pytest.mark.proof
@pytest.mark.parametrize("file", of_platform("tpu"), ids=lambda file: file.stem)
def test_a_recipe_compiles_for_its_tpus(file: Path):
    pytest.importorskip("libtpu")
    assert_compiles(file)


@pytest.mark.proof
@pytest.mark.parametrize("file", of_platform("gpu"), ids=lambda file: file.stem)
def test_a_recipe_compiles_for_its_gpus(file: Path):
    pytest.importorskip("jax_plugins.xla_cuda13")
    assert_compiles(file)
