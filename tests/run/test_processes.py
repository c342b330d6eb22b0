"""Several processes over jax.distributed train as one does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


COMMAND = "from lmjax.cli.main import main; main()"

IN_PROCESS_1_BEFORE_BATCH_2 = """
import os, signal
from lmjax.train import loop
make = loop.batch_maker
def batch_maker(*arguments):
    inner = make(*arguments)
    def batch(step):
        if step == 2 and os.environ["JAX_PROCESS_ID"] == "1":
            {}
        return inner(step)
    return batch
loop.batch_maker = batch_maker
"""
"""What happens to one of the processes while a run is under way."""


def launch(processes: int, devices: int, *arguments: str, code: str = COMMAND) -> subprocess.CompletedProcess[str]:
    """``lmjax`` (or ``code``) in ``processes`` processes of ``devices`` CPU devices each."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
    }
    program = [sys.executable, "-c", code, *arguments]
    command = [str(ROOT / "launch" / "local.sh"), str(processes), *program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def train_rows(run: Path) -> list[dict]:
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


@pytest.mark.slow
def test_two_processes_of_four_devices_equal_one_of_eight(experiment: Callable[..., str], tmp_path: Path):
    sections = {
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "train": {"steps": 20},
        "checkpoint": {"every_steps": 10},
        "evaluate": {"every_steps": 10, "prompts": ["the model"], "sample_tokens": 4, "temperature": 0.0},
    }
    for name, processes, devices in (("one", 1, 8), ("two", 2, 4)):
        ended = launch(processes, devices, "train", experiment(name, **sections))
        assert ended.returncode == 0, ended.stdout + ended.stderr
    one, two = train_rows(tmp_path / "one"), train_rows(tmp_path / "two")
    assert len(one) == 20
    assert [row["batch_hash"] for row in two] == [row["batch_hash"] for row in one]
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-6)
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("one", "two")]
    assert samples[0] == samples[1] != ""

    # Half of the run in two processes, the rest in one: the same batches, whatever the number of processes.
    sections["train"] = {"steps": 20}
    file = experiment("moved", **sections)
    ended = launch(2, 4, "train", file, "train.steps=10")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    ended = launch(1, 8, "train", file)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [row["batch_hash"] for row in train_rows(tmp_path / "moved")] == [row["batch_hash"] for row in one]


def test_a_process_that_refuses_its_config_ends_all_of_them_with_2(experiment: Callable[..., str], tmp_path: Path):
    ended = launch(2, 1, "train", experiment("refused"), "mesh.data=3")
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "3" in ended.stderr + ended.stdout
    assert "data" in ended.stderr + ended.stdout
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_of_them_after_the_same_step(experiment: Callable[..., str], tmp_path: Path):
    file = experiment("stopped", checkpoint={"every_steps": 100})
    code = IN_PROCESS_1_BEFORE_BATCH_2.format("os.kill(os.getpid(), signal.SIGTERM)") + COMMAND
    ended = launch(2, 1, "train", file, code=code)
    assert ended.returncode == 75, ended.stdout + ended.stderr
    last = train_rows(tmp_path / "stopped")[-1]["step"]
    assert last < 6
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == [str(last)]
    for process in range(2):
        assert f"[{process}] lmjax: stopped by a signal after step {last}" in ended.stderr
    ended = launch(2, 1, "train", file)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [row["step"] for row in train_rows(tmp_path / "stopped")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_of_them(experiment: Callable[..., str]):
    code = IN_PROCESS_1_BEFORE_BATCH_2.format('raise loop.InputError("this row cannot be read")') + COMMAND
    ended = launch(2, 1, "train", experiment("failed"), code=code)
    assert "[1] lmjax: this row cannot be read" in ended.stderr
    assert ended.returncode != 0
