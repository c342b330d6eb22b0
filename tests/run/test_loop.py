"""A run from the command line: its files, its resumption bit for bit, and how it ends."""

import contextlib
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from lmjax.errors import InputError
from lmjax.train import held_out, loop
from lmjax.train.metrics import Recorder
from lmjax.train.step import StepMetrics
from tests.command import lmjax

Experiment = Callable[..., str]


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def train_rows(run: Path) -> list[tuple]:
    """What has to be the same, bit for bit, in every run of an experiment."""
    found = [row for row in rows(run) if "loss" in row]
    return [(row["step"], row["batch_hash"], row["loss"], row["grad_norm"], row["tokens"]) for row in found]


def evaluation_rows(run: Path) -> list[tuple]:
    return [(row["step"], row["eval_loss"]) for row in rows(run) if "eval_loss" in row]


@pytest.fixture
def whole(experiment: Experiment, tmp_path: Path) -> Path:
    """An uninterrupted run."""
    assert lmjax("train", experiment("whole")) == 0
    return tmp_path / "whole"


def test_a_run_writes_its_files_and_a_second_start_says_that_it_is_done(
    whole: Path, capsys: pytest.CaptureFixture[str]
):
    names = {path.name for path in whole.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints", "log.txt", "report.html"}
    assert names >= {"tensorboard", "run.json"}
    found = rows(whole)
    assert [row["step"] for row in found if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in found if "eval_loss" in row] == [0, 3, 6]
    keys = {"step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "step_seconds", "mfu"}
    keys |= {"memory_bytes", "batch_hash", "data_wait_share"}
    assert all(keys <= set(row) for row in found if "loss" in row)
    evaluation = [row for row in found if "eval_loss" in row]
    assert all({"step", "eval_loss", "perplexity", "unigram_loss"} <= set(row) for row in evaluation)
    assert evaluation[-1]["eval_loss"] < evaluation[0]["eval_loss"]
    assert {path.name for path in (whole / "checkpoints").iterdir()} == {"2", "4", "6"}
    before = (whole / "metrics.jsonl").read_bytes()
    assert lmjax("train", str(whole / "config.yaml")) == 0
    assert "all 6 steps are done" in capsys.readouterr().out
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("kept", ["2", "4"])
def test_a_run_that_lost_its_later_steps_ends_with_the_same_bits(whole: Path, kept: str):
    expected, evaluations = train_rows(whole), evaluation_rows(whole)
    for step in (whole / "checkpoints").iterdir():
        if int(step.name) > int(kept):
            shutil.rmtree(step)
    assert lmjax("train", str(whole / "config.yaml")) == 0
    assert train_rows(whole) == expected
    assert evaluation_rows(whole) == evaluations


@pytest.mark.slow
def test_accumulation_bfloat16_and_a_sharded_mesh_resume_to_the_same_bits(experiment: Experiment, tmp_path: Path):
    """Without batch hashes, with every second row written, and samples drawn between the updates."""
    file = experiment(
        "whole",
        mesh={"data": 2, "fsdp": 2, "tensor": 2},
        precision={"compute": "bfloat16"},
        train={"accumulation": 2, "log_batch_hash": False},
        logging={"every_steps": 2},
        evaluate={"prompts": ["the"], "sample_tokens": 4},
        checkpoint={"every_steps": 3},
    )
    run = tmp_path / "whole"

    def told() -> tuple:
        train = [(row["step"], row["loss"], row["grad_norm"], row["tokens"]) for row in rows(run) if "loss" in row]
        return train, evaluation_rows(run), (run / "samples.jsonl").read_text()

    assert lmjax("train", file) == 0
    whole = told()
    assert [row[0] for row in whole[0]] == [2, 4, 6]
    shutil.rmtree(run / "checkpoints" / "6")
    assert lmjax("train", file) == 0
    assert told() == whole


def test_another_seed_gives_other_batches_and_losses(whole: Path, experiment: Experiment, tmp_path: Path):
    assert lmjax("train", experiment("other", train={"seed": 1})) == 0
    for one, other in zip(train_rows(whole), train_rows(tmp_path / "other"), strict=True):
        assert one[1] != other[1]
        assert one[2] != other[2]


def test_a_signal_saves_and_exits_75_and_the_run_goes_on(
    whole: Path, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make = loop.batch_maker

    def with_signal(*arguments):
        inner = make(*arguments)

        def batch(step: int):
            if step == 2:  # the third batch is made at the latest while the first update is under way
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(step)

        return batch

    monkeypatch.setattr(loop, "batch_maker", with_signal)
    file = experiment("stopped")
    assert lmjax("train", file) == 75
    run = tmp_path / "stopped"
    saved = [int(path.name) for path in (run / "checkpoints").iterdir()]
    assert max(saved) == train_rows(run)[-1][0] < 6
    monkeypatch.undo()
    assert lmjax("train", file) == 0
    assert train_rows(run) == train_rows(whole)


def test_a_loss_that_is_not_finite_exits_3_with_the_last_checkpoint_intact(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    compiled = loop.compile_step

    def spoiled(*arguments):
        step = compiled(*arguments)

        def run(state, batch):
            number = int(state.step) + 1
            state, metrics = step(state, batch)
            return state, StepMetrics(metrics.loss * float("nan"), *metrics[1:]) if number == 4 else metrics

        return run

    monkeypatch.setattr(loop, "compile_step", spoiled)
    monkeypatch.setattr(loop.jax, "transfer_guard", lambda _: contextlib.nullcontext())  # spoiling moves scalars
    file = experiment("diverged")
    assert lmjax("train", file) == 3
    assert "step 4: loss is nan" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "diverged" / "checkpoints").iterdir()) == ["2"]
    assert lmjax("checkpoint", "verify", str(tmp_path / "diverged" / "checkpoints")) == 0


def test_an_evaluation_that_is_not_finite_exits_3_and_its_parameters_are_not_saved(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    make = held_out.make_evaluator

    def make_spoiled(*arguments):
        evaluate = make(*arguments)
        results = []

        def spoiled(*arguments):
            results.append(evaluate(*arguments))
            return results[-1]._replace(eval_loss=float("nan")) if len(results) == 3 else results[-1]

        return spoiled

    monkeypatch.setattr(held_out, "make_evaluator", make_spoiled)
    assert lmjax("train", experiment("diverged")) == 3
    assert "step 6: eval_loss is nan; the run is stopped and the checkpoint of step 4" in capsys.readouterr().err
    run = tmp_path / "diverged"
    assert [step for step, _ in evaluation_rows(run)] == [0, 3]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4"]


def test_a_run_that_fails_anywhere_ends_its_threads_and_its_logging(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def failing(*_):
        raise InputError("the disk is full")

    file = experiment("failing")
    monkeypatch.setattr(loop.Saver, "close", failing)
    assert lmjax("train", file, "train.steps=1") == 2
    monkeypatch.undo()
    monkeypatch.setattr(loop, "Saver", failing)
    assert lmjax("train", file) == 2
    assert capsys.readouterr().err.count("the disk is full") == 2
    assert logging.getLogger("lmjax").handlers == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed")]


def test_a_dry_run_prints_every_leaf_and_writes_nothing(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert lmjax("train", experiment("dry"), "mesh.fsdp=4", "mesh.tensor=2", "--dry-run", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    leaves = {leaf["path"]: leaf for leaf in printed["leaves"]}
    table = leaves["params.embed.table"]
    assert table["spec"] == "P('tensor', ('fsdp', 'expert'))"
    assert table["bytes_per_device"] == 384 * 32 * 4 // 8
    assert any(path.startswith("opt_state") for path in leaves)
    assert printed["bytes_per_device"] == sum(leaf["bytes_per_device"] for leaf in leaves.values())
    assert not (tmp_path / "dry").exists()


def test_metrics_of_an_update_are_fetched_after_the_next_was_dispatched(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
):
    happened: list[tuple[str, int]] = []
    compiled, written = loop.compile_step, Recorder.train_row

    def noted(*arguments):
        step = compiled(*arguments)

        def dispatch(state, batch):
            happened.append(("dispatched", 1 + sum(what == "dispatched" for what, _ in happened)))
            return step(state, batch)

        return dispatch

    def row(self, row, **options):
        happened.append(("written", row["step"]))
        written(self, row, **options)

    monkeypatch.setattr(loop, "compile_step", noted)
    monkeypatch.setattr(Recorder, "train_row", row)
    sections = {"train": {"steps": 4}, "checkpoint": {"every_steps": 9}, "evaluate": {"every_steps": 9}}
    assert lmjax("train", experiment("run", **sections)) == 0
    one_late = [("dispatched", 1), ("dispatched", 2), ("written", 1), ("dispatched", 3), ("written", 2)]
    assert happened == [*one_late, ("dispatched", 4), ("written", 3), ("written", 4)]


def test_a_step_that_moves_data_by_itself_is_an_error(experiment: Experiment, monkeypatch: pytest.MonkeyPatch):
    compiled = loop.compile_step

    def careless(*arguments):
        step = compiled(*arguments)
        return lambda state, batch: step(state, jax.tree.map(lambda field: field + np.ones((), field.dtype), batch))

    monkeypatch.setattr(loop, "compile_step", careless)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        lmjax("train", experiment("run"))


def test_a_signal_before_the_first_step_stops_the_run_after_it(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    compiled = loop.compile_step

    def with_signal(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return compiled(*arguments)

    monkeypatch.setattr(loop, "compile_step", with_signal)
    assert lmjax("train", experiment("run")) == 75
    assert [row[0] for row in train_rows(tmp_path / "run")] == [1]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]


def test_a_step_compiled_by_the_planner_is_loaded_and_gives_the_same_run(
    whole: Path, experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file, config = str(tmp_path / "step"), experiment("loaded")
    assert lmjax("plan", config, "--topology", "cpu:8", "--compile", "--executable", file) == 0
    assert f"{file}: for jax {jax.__version__}, jaxlib " in capsys.readouterr().out.replace("\n", " ")
    assert lmjax("train", config, "--executable", file) == 0
    assert train_rows(tmp_path / "loaded") == train_rows(whole)
    log = (tmp_path / "loaded" / "log.txt").read_text()
    assert "the step was loaded, and is not compiled" in log
    assert "the step compiled" not in log
    # Another seed is another program only where something is drawn from it; a longer schedule is another one.
    other = experiment("other", train={"steps": 7})
    assert lmjax("train", other, "--executable", file) == 2
    assert "compiled for something else (program" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()  # so that the corrected command is one of a new run


def test_an_executable_and_a_dry_run_do_not_go_together(experiment: Experiment, capsys: pytest.CaptureFixture[str]):
    assert lmjax("train", experiment("dry"), "--dry-run", "--executable", "step") == 2
    assert "--executable has no effect with --dry-run" in capsys.readouterr().err


def test_flags_of_the_compiler_are_told_and_a_wrong_one_is_refused(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert lmjax("train", experiment("fast", train={"xla_flags": {"xla_cpu_enable_fast_math": True}})) == 0
    assert "compiler flags: xla_cpu_enable_fast_math=True" in (tmp_path / "fast" / "log.txt").read_text()
    assert lmjax("train", experiment("wrong", train={"xla_flags": {"xla_nonsense": True}})) == 2
    assert "the compiler refuses xla_nonsense=True" in capsys.readouterr().err
