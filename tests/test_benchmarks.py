"""Benchmarks for machines that are lent by the hour: they run, and what they compare computes the same."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.train_gpu import compared

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_all_forms_of_a_layer_of_experts_give_what_transformers_block_gives():
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "benchmarks.moe_gpu", "--small", "--rounds", "1"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    forms = json.loads(done.stdout.splitlines()[-1])["forms"]
    assert forms.keys() >= {"dense", "blocks", "ragged_dot", "transformers eager", "transformers grouped_mm"}
    for name, form in forms.items():
        assert form["seconds"] > 0, (name, form)
        assert name == "dense" or form["difference"] < 1e-5, name


@pytest.mark.slow
def test_the_benchmark_of_attention_checks_every_feature_of_every_kernel_that_can(tmp_path):
    plot = tmp_path / "speeds.png"
    command = [sys.executable, "-m", "benchmarks.attention", "--small", "--rounds", "1", "--plot", str(plot)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    numerics = {row["problem"]: row["differences"] for row in found["numerics"]}
    for feature, kernels in numerics.items():
        assert kernels.keys() - {"torch math"} == {"reference", "chunked"}, feature
        assert all(max(differences) < 1e-5 for differences in kernels.values()), feature
    assert numerics.keys() >= {"window", "packed", "softcap", "alibi", "sinks", "prefix", "all"}
    assert ("torch math" in numerics["causal"]) == (importlib.util.find_spec("torch") is not None)
    (causal,) = found["speeds"]
    assert all(causal[name]["both"]["ms"] > 0 for name in numerics["causal"])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_benchmark_of_attention_needs_little_but_jax():
    """On a rented machine there may be nothing else."""
    absent = ("flax", "optax", "orbax", "grain", "omegaconf", "pydantic", "etils", "typer", "rich")
    program = f"import sys; sys.modules.update(dict.fromkeys({absent})); from benchmarks.attention import KERNELS; "
    program += "print(KERNELS.keys())"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "flash_hopper" in done.stdout


@pytest.mark.slow
def test_the_benchmark_of_training_times_only_what_comes_to_the_same_losses(tmp_path):
    pytest.importorskip("torch")
    plot = tmp_path / "train.png"
    command = [sys.executable, "-m", "benchmarks.train_gpu", "--small", "--plot", str(plot)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [(row["length"], row["packed"]) for row in found["cases"]] == [(64, False), (64, True)]
    for row in found["cases"]:
        assert row["loss_difference"] < 1e-5
        assert row["ratio"] > 0
    plain, packed = found["cases"]
    assert abs(packed["ours"]["losses"][0] / plain["ours"]["losses"][0] - 1) > 1e-4
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.fast
@pytest.mark.parametrize(("loss", "is_timed"), [(4.0 * (1 + 9e-6), True), (4.0 * (1 + 2e-5), False)])
def test_losses_that_differ_leave_no_ratio(loss, is_timed):
    told = {"model": "tiny", "length": 64, "packed": False, "losses": [5.0, 4.0], "tokens_per_second": 10}
    assert ("ratio" in compared(told, told | {"losses": [5.0, loss]})) == is_timed
    assert "ratio" not in compared(told, {"model": "tiny", "length": 64, "packed": False, "error": "memory"})
