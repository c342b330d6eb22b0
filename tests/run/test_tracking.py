"""What a run leaves for other programs: event files, traces, and what it was made with."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from lmjax.data.batches import Batches
from tests.command import lmjax
from tests.train.test_tracking import FakeWandb, events, scalars

Experiment = Callable[..., str]


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_is_tracked_as_one(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every second row is written, so that every second batch is hashed; the trace is of steps 3 and 4."""
    hashed, traced = [], []
    hash_of, start_trace = Batches.hash, jax.profiler.start_trace
    monkeypatch.setattr(Batches, "hash", lambda self, step: hashed.append(step + 1) or hash_of(self, step))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: traced.append(path) or start_trace(path))
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    logging = {"every_steps": 2, "profile_steps": [3, 4], "wandb": {"project": "p"}}
    file = experiment("run", logging=logging)
    run = tmp_path / "run"
    assert lmjax("train", file) == 0
    assert hashed == [2, 4, 6]
    assert traced == [str(run / "profile")]
    assert len(list((run / "profile").rglob("*.xplane.pb"))) == 1
    for step in ("4", "6"):
        shutil.rmtree(run / "checkpoints" / step)
    assert lmjax("train", file, "logging.profile_steps=null") == 0
    assert len(traced) == 1

    written = rows(run)
    assert [(row["step"], "loss" in row) for row in written] == [
        (step, is_train) for step, is_train in [(0, False), (2, True), (3, False), (4, True), (6, True), (6, False)]
    ]
    assert all(0 <= row["data_wait_share"] <= 1 for row in written if "loss" in row)
    shown = [(step, tag) for step, tag, _ in events(run / "tensorboard")]
    assert shown == [(row["step"], tag) for row in written for tag in scalars(row)]
    losses = [value for _, tag, value in events(run / "tensorboard") if tag == "train/loss"]
    assert losses == pytest.approx([row["loss"] for row in written if "loss" in row], rel=1e-6)

    record = json.loads((run / "run.json").read_text())
    assert [start["step"] for start in record["starts"]] == [0, 2]
    assert [start["id"] for start in fake.started] == [record["id"]] * 2
    assert fake.ended == [0, 0]
    assert {step for step, _ in fake.logged} == {0, 2, 3, 4, 6}
    assert record["starts"][0]["versions"]["jax"] == jax.__version__ in (run / "report.html").read_text()


def test_the_row_of_an_update_has_its_mixture(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Batches, "mixture", lambda self, step: {"code": step, "prose": 8 - step})
    assert lmjax("train", experiment("run")) == 0
    found = [row["mixture"] for row in rows(tmp_path / "run") if "loss" in row]
    assert found == [{"code": step, "prose": 8 - step} for step in range(6)]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.steps=3", "optimizer.warmup_steps=4"], "train.steps 3 is below optimizer.warmup_steps 4"),
        (["logging.profile_steps=[5,7]"], "train.steps is 6"),
        (["logging.profile_steps=[0,3]"], "profile_steps"),
        (["logging.profile_steps=[3,2]"], "profile_steps"),
        (["logging.wandb={project: p}"], "lmjax[wandb]"),
        (["evaluate.early_stopping={patience: 0}"], "patience"),
    ],
)
def test_what_cannot_be_tracked_is_refused_before_the_first_step(
    experiment: Experiment,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    said: str,
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert lmjax("train", experiment("run"), *overrides) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
