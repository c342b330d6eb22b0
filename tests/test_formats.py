"""What the first version of the formats wrote is still read: a dataset, and a run with its checkpoint.

``tests/data/format_1`` was written by ``lmjax data prepare`` and ``lmjax train`` and is never made anew.
"""

import json
import shutil
from pathlib import Path

import pytest

from lmjax.data.index import read_index
from tests.command import lmjax

KEPT = Path(__file__).parent / "data" / "format_1"
SCORED = {"tokens": 36, "nll": 190.66466236114502}
"""Of texts/003.txt, by the version that wrote the checkpoint."""


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in, as the current directory: the paths in it are relative."""
    place = Path(shutil.copytree(KEPT, tmp_path / "format_1"))
    monkeypatch.chdir(place)
    return place


def test_the_checkpoint_verifies_and_scores_a_text_as_it_did(kept: Path, capsys: pytest.CaptureFixture[str]):
    assert lmjax("checkpoint", "verify", "run") == 0
    capsys.readouterr()
    assert lmjax("evaluate", "run", "--text", "texts/003.txt", "--json") == 0
    score = json.loads(capsys.readouterr().out)
    assert score["tokens"] == SCORED["tokens"]
    assert score["nll"] == pytest.approx(SCORED["nll"], rel=1e-5)


def test_the_dataset_is_what_its_sources_give_today(kept: Path):
    old = {path.name: path.read_bytes() for path in (kept / "dataset").iterdir()}
    assert lmjax("data", "prepare", "run/config.yaml", "data.path=anew") == 0
    new = {path.name: path.read_bytes() for path in (kept / "anew").iterdir()}
    assert sorted(new) == sorted(old)
    assert new["tokenizer.model"] == old["tokenizer.model"]
    assert read_index("anew").shards == read_index("dataset").shards
    assert read_index("anew").token_counts == read_index("dataset").token_counts
    for name in old:
        if name.startswith("plan-"):
            assert new[name] == old[name], name


def test_the_run_goes_on_from_the_kept_step(kept: Path):
    before = (kept / "run" / "metrics.jsonl").read_text()
    assert lmjax("train", "run/config.yaml", "train.steps=6") == 0
    after = (kept / "run" / "metrics.jsonl").read_text()
    assert after.startswith(before)
    rows = [row for row in map(json.loads, after.splitlines()) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_batch_of_the_kept_dataset_is_the_same_bits(kept: Path, tmp_path: Path):
    hashes = [
        row["batch_hash"]
        for row in map(json.loads, (kept / "run" / "metrics.jsonl").read_text().splitlines())
        if "loss" in row
    ]
    assert lmjax("train", "run/config.yaml", "run_dir=anew", "train.steps=4") == 0
    rows = [json.loads(line) for line in (kept / "anew" / "metrics.jsonl").read_text().splitlines()]
    assert [row["batch_hash"] for row in rows if "loss" in row] == hashes
