"""How a run ends early, and what it owes and refuses when it is started again."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lmjax.train import loop
from tests.command import lmjax
from tests.run.conftest import EXPERIMENT

Experiment = Callable[..., str]


def told(run: Path) -> list[tuple]:
    """Steps and losses of all rows, in their order."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row.get("loss"), row.get("eval_loss")) for row in found]


def saved(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def trained(dataset: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 6 updates, evaluated after 0, 3 and 6 and saved after 2, 4 and 6."""
    root = tmp_path_factory.mktemp("trained")
    file = root / "whole.yaml"
    file.write_text(yaml.safe_dump({**EXPERIMENT, "data": dataset, "run_dir": str(root / "whole")}))
    assert lmjax("train", str(file)) == 0
    return root / "whole"


@pytest.fixture
def whole(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, which ``experiment("whole")`` goes on with."""
    return Path(shutil.copytree(trained, tmp_path / "whole"))


def test_early_stopping_saves_and_ends_the_run_and_a_resumed_run_decides_the_same(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """No loss falls by 100 nats: the evaluations after steps 2 and 4 use the patience up."""
    evaluate = {"every_steps": 2, "early_stopping": {"patience": 2, "min_delta": 100.0}}
    file = experiment("run", evaluate=evaluate, checkpoint={"every_steps": 3})
    run = tmp_path / "run"
    assert lmjax("train", file) == 0
    assert "stopped early after step 4, which is saved" in capsys.readouterr().out
    assert saved(run) == ["3", "4"]
    first = told(run)
    assert [row[0] for row in first] == [0, 1, 2, 2, 3, 4, 4]

    assert lmjax("train", file) == 0
    assert "stopped early after step 4: the evaluation loss has not fallen" in capsys.readouterr().out
    assert told(run) == first
    shutil.rmtree(run / "checkpoints" / "4")
    assert lmjax("train", file) == 0
    assert told(run) == first
    assert saved(run) == ["3", "4"]

    assert lmjax("train", file, "evaluate.early_stopping=null") == 0
    assert saved(run) == ["3", "4", "6"]
    assert told(run)[: len(first)] == first
    assert [row[0] for row in told(run)[len(first) :]] == [5, 6, 6]


@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 6])
def test_a_signal_where_an_evaluation_is_due_saves_first_and_the_evaluation_is_made_up_for(
    whole: Path, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    compiled = loop.compile_step

    def with_signal(*arguments):
        update = compiled(*arguments)
        calls = []

        def run(state, batch):
            calls.append(None)
            if len(calls) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(state, batch)

        return run

    monkeypatch.setattr(loop, "compile_step", with_signal)
    file = experiment("stopped")
    run = tmp_path / "stopped"
    assert lmjax("train", file) == 75
    assert str(step) in saved(run)
    before = told(run)
    assert before == told(whole)[: len(before)]
    assert [row[0] for row in before if row[2] is not None] == list(range(0, step, 3))
    monkeypatch.undo()
    assert lmjax("train", file) == 0
    assert told(run) == told(whole)


def test_a_run_whose_checkpoints_are_gone_is_refused_and_keeps_its_rows(
    whole: Path, experiment: Experiment, capsys: pytest.CaptureFixture[str]
):
    before = (whole / "metrics.jsonl").read_bytes()
    shutil.rmtree(whole / "checkpoints")
    for _ in range(2):
        capsys.readouterr()
        assert lmjax("train", experiment("whole")) == 2
        assert "metrics.jsonl goes to step 6, but there is no checkpoint" in capsys.readouterr().err
        assert (whole / "metrics.jsonl").read_bytes() == before
        (whole / "checkpoints").mkdir(exist_ok=True)  # emptied: two checkpoints must have been there by step 6


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again_and_says_so(
    whole: Path, experiment: Experiment, capsys: pytest.CaptureFixture[str]
):
    expected = told(whole)
    shutil.rmtree(whole / "checkpoints")
    (whole / "checkpoints").mkdir()
    kept = (whole / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:3]
    (whole / "metrics.jsonl").write_bytes(b"".join(kept))
    assert lmjax("train", experiment("whole")) == 0
    assert "the rows of metrics.jsonl from step 1 to 2 are written anew" in capsys.readouterr().out
    assert told(whole) == expected


def test_a_dataset_that_was_moved_goes_on_and_another_one_is_refused(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text(f"a text of its own, number {number}, to be read by its bytes")
    section = {"path": str(tmp_path / "here"), "sources": [{"kind": "files", "path": str(texts)}], "num_workers": 1}
    file = experiment("run", data=section)
    run = tmp_path / "run"
    assert lmjax("data", "prepare", file) == 0
    assert lmjax("train", file) == 0
    first = told(run)
    (tmp_path / "here").rename(tmp_path / "there")
    for step in ("4", "6"):
        shutil.rmtree(run / "checkpoints" / step)
    assert lmjax("train", file, f"data.path={tmp_path / 'there'}", "data.num_workers=2") == 0
    assert told(run) == first

    (texts / "0.txt").write_text("a text that was changed, and from which the same options make another dataset")
    assert lmjax("data", "prepare", file) == 0
    before = (run / "config.yaml").read_bytes()
    capsys.readouterr()
    assert lmjax("train", file) == 2
    assert "trained on the dataset" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before


def test_early_stopping_without_held_out_documents_is_refused(
    experiment: Experiment, dataset: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    section = {**dataset, "path": str(tmp_path / "all"), "validation_fraction": 0.0, "num_workers": 1}
    file = experiment("run", data=section, evaluate={"early_stopping": {"patience": 1}})
    assert lmjax("data", "prepare", file) == 0
    capsys.readouterr()
    assert lmjax("train", file) == 2
    assert "evaluate.early_stopping has no effect" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
