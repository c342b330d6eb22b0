"""A run whose directory is in an object store goes on from there on a machine that has nothing of it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from etils import epath

from tests.command import lmjax

Experiment = Callable[..., str]


def told(run: epath.Path) -> list[tuple]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row.get("loss"), row.get("eval_loss")) for row in found]


@pytest.mark.slow
def test_a_run_in_a_store_goes_on_where_it_was(
    experiment: Experiment, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = experiment("run")
    run = epath.Path(bucket) / "run"
    assert lmjax("train", file, f"run_dir={run}") == 0
    whole = told(run)
    assert [row[0] for row in whole] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    for step in ("4", "6"):
        (run / "checkpoints" / step).rmtree()
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "another-machine"))
    assert lmjax("train", file, f"run_dir={run}") == 0
    assert told(run) == whole
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert [start["step"] for start in json.loads((run / "run.json").read_text())["starts"]] == [0, 2]
    assert "Run run" in (run / "report.html").read_text()
    names = {path.name for path in run.iterdir()}
    files = {"config.yaml", "run.json", "metrics.jsonl", "samples.jsonl", "log.txt", "report.html"}
    assert names == files | {"checkpoints", "tensorboard"}
