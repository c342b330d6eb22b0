"""report.html: everything of a run in one file, nothing of it taken as markup, and clear words for a broken run."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lmjax.errors import InputError
from lmjax.train.curves import CURVES, draw_curves
from lmjax.train.records import RATES, read_records
from lmjax.train.report import write_report

PNG = b"\x89PNG\r\n\x1a\n"


def train_row(step: int, **changes: Any) -> dict[str, Any]:
    row = {
        "step": step,
        "loss": 5.0 / step,
        "grad_norm": 1.0 + step,
        "learning_rate": 1e-3,
        "tokens": 2048.0 * step,
        "tokens_per_second": 12_345.6,
        "mfu": None,
        "memory_bytes": None,
    }
    return row | changes


def evaluation_row(step: int) -> dict[str, Any]:
    return {"step": step, "eval_loss": 4.0 - step, "perplexity": 54.598, "unigram_loss": 5.125, "tokens": 4096}


def make_run(directory: Path, metrics: list[dict], samples: list[dict] | None = None) -> Path:
    directory.mkdir()
    (directory / "config.yaml").write_text("train:\n  steps: 3 # <b>\n")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if samples is not None:
        (directory / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return directory


def pictures(text: str) -> dict[str, bytes]:
    """The embedded pictures by their description."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', text)
    return {alt: base64.b64decode(data) for alt, data in found}


def test_a_report_holds_curves_values_samples_and_config(tmp_path: Path):
    samples = [
        {"step": step, "prompt": "def ", "text": f"<script>alert({step})</script> & \u2028more"} for step in (0, 3)
    ]
    rows = [evaluation_row(0), *(train_row(step) for step in (1, 2, 3)), evaluation_row(3)]
    run = make_run(tmp_path / "a<b>", rows, samples)
    assert write_report([str(run)]) == run / "report.html"
    text = (run / "report.html").read_text(encoding="utf-8")
    found = pictures(text)
    assert [alt.split(" over")[0] for alt in found] == [
        "Training and evaluation loss",
        "Learning rate",
        "Norm of the gradient, before clipping",
        "Speed",
    ]
    assert all(png.startswith(PNG) for png in found.values())
    assert re.findall(r'(?:src|href)="(?!data:)', text) == []
    assert "<script>" not in text
    assert "&lt;script&gt;alert(3)" in text
    assert text.index("alert(3)") < text.index("<details>") < text.index("alert(0)")
    assert "a&lt;b&gt;" in text
    assert "steps: 3 # &lt;b&gt;" in text
    values = dict(re.findall(r"<tr><td>(.*)</td><td>(.*)</td></tr>", text.partition("<th>Evaluation")[0]))
    assert values["step"] == "3"
    assert values["loss"] == repr(5.0 / 3)
    assert values["tokens_per_second"] == "12,346"
    assert values["mfu"] == "not known"
    assert [path.name for path in run.glob("*.tmp")] == []


def test_a_run_that_was_only_evaluated_has_a_report(tmp_path: Path):
    run = make_run(tmp_path / "run", [evaluation_row(0)])
    text = write_report([str(run)]).read_text(encoding="utf-8")
    assert len(pictures(text)) == 1
    assert "Samples" not in text


def test_a_known_mfu_has_a_picture_and_the_pictures_show_the_values(tmp_path: Path):
    drawn = []
    for name, changes in (("a", {}), ("b", {"mfu": 0.4, "loss": 7.0})):
        run = make_run(tmp_path / name, [train_row(1), train_row(2, **changes)])
        drawn.append({alt.split(" over")[0]: png for alt, png in draw_curves({"run": read_records(run)})})
    a, b = drawn
    assert b.keys() - a.keys() == {"Model FLOPs utilisation"}
    assert a["Speed"] == b["Speed"]
    assert a["Training and evaluation loss"] != b["Training and evaluation loss"]


@pytest.mark.fast
def test_a_last_line_that_a_kill_cut_short_is_left_out_and_named(tmp_path: Path):
    run = make_run(tmp_path / "run", [train_row(1)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "los')
    records = read_records(run)
    assert [row["step"] for row in records.train] == [1]
    assert records.cut == ["metrics.jsonl"]


@pytest.mark.fast
@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{oops}", "line 2: not JSON"),
        ("", "line 2: not JSON"),
        ("[2]", "line 2: not an object with a step"),
        ('{"loss": 1.0}', "line 2: not an object with a step"),
        ('{"step": 2}', "line 2: neither a row of training"),
        ('{"step": 2, "loss": "1.0"}', "line 2: loss is '1.0'"),
        ('{"step": 2, "loss": 1.0, "mfu": true}', "line 2: mfu is True"),
        ('{"step": 2, "eval_loss": 1.0}', "line 2: unigram_loss is None"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, problem: str):
    run = make_run(tmp_path / "run", [train_row(1)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n" + json.dumps(train_row(3)) + "\n")
    with pytest.raises(InputError, match=re.escape(problem)):
        write_report([str(run)])
    assert not (run / "report.html").exists()


@pytest.mark.fast
def test_what_is_no_run_or_has_no_metrics_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no such run"):
        write_report([str(tmp_path / "absent")])
    with pytest.raises(InputError, match="no config.yaml"):
        write_report([str(tmp_path)])
    with pytest.raises(InputError, match="no metrics yet"):
        write_report([str(make_run(tmp_path / "run", []))])


def test_several_runs_of_unequal_length_stand_in_the_same_pictures(tmp_path: Path):
    long = make_run(tmp_path / "long", [evaluation_row(0), *(train_row(step) for step in (1, 2, 3)), evaluation_row(3)])
    short = make_run(tmp_path / "<short>", [evaluation_row(0), train_row(1, loss=7.5)])
    (short / "config.yaml").write_text("run_dir: other\ntrain:\n  steps: 1\n  seed: 5\n")
    (long / "config.yaml").write_text("run_dir: this\ntrain:\n  steps: 3\n  seed: 5\n")
    output = tmp_path / "both.html"
    assert write_report([str(long), str(short)], str(output)) == output
    text = output.read_text(encoding="utf-8")
    assert "<short>" not in text
    assert text.count("<img") == len(pictures(text)) == 4
    assert "<tr><td>train.steps</td><td>3</td><td>1</td></tr>" in text
    assert "train.seed" not in text
    assert "run_dir" not in text
    assert f"<tr><td>long</td><td>3</td><td>{4.0 - 3!r}</td>" in text
    assert "<td>7.5</td>" in text
    both = draw_curves({"long": read_records(long), "short": read_records(short)})
    assert not {png for _, png in both} & {png for _, png in draw_curves({"long": read_records(long)})}
    assert not (long / "report.html").exists()


@pytest.mark.fast
def test_a_run_that_is_named_twice_and_an_output_without_a_directory_are_refused(tmp_path: Path):
    run = make_run(tmp_path / "run", [train_row(1)])
    with pytest.raises(InputError, match="named twice"):
        write_report([str(run), f"{run}/"])
    with pytest.raises(InputError, match="there is no directory"):
        write_report([str(run)], str(tmp_path / "absent" / "report.html"))


@pytest.mark.fast
def test_runs_whose_directories_end_alike_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lmjax.train.report.draw_curves", lambda runs: [])
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        make_run(tmp_path / parent / "run", [train_row(1)])
    monkeypatch.chdir(tmp_path)
    assert write_report(["a/run", "b/run"]) == Path("comparison.html")
    assert "<h1>Runs a/run, b/run</h1>" in Path("comparison.html").read_text()


@pytest.mark.fast
def test_each_start_is_shown_with_its_commit_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lmjax.train.report.draw_curves", lambda runs: [])
    run = make_run(tmp_path / "run", [train_row(1)])
    start = {"time": "2026-01-02T03:04:05+00:00", "step": 0, "commit": "0123456789abcdef", "dirty": True}
    start |= {
        "versions": {"jax": "9.9", "libtpu": None},
        "devices": [{"platform": "tpu", "kind": "TPU v9", "count": 4}],
    }
    record = {"id": "a", "starts": [start, start | {"step": 1, "commit": None, "dirty": None}]}
    (run / "run.json").write_text(json.dumps(record))
    text = write_report([str(run)]).read_text(encoding="utf-8")
    assert "<td>0123456789ab with changes</td>" in text
    assert "<td>not known</td>" in text
    assert "4 TPU v9" in text
    assert "jax 9.9" in text
    assert "libtpu" not in text


@pytest.mark.fast
def test_what_is_drawn_is_checked_to_be_numbers():
    assert {curve.field for curve in CURVES} == set(RATES)
