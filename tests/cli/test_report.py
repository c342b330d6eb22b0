"""``lmjax report``."""

import json
from pathlib import Path

import pytest

from lmjax.cli import main as cli


def end(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code if isinstance(caught.value.code, int) else 1


def test_report_writes_the_file_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "config.yaml").write_text("run_dir: here\n")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.5}) + "\n")
    assert end(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert "<!doctype html>" in (tmp_path / "report.html").read_text()


def test_several_runs_are_compared_in_the_file_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, loss in (("a", 2.5), ("b", 1.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("run_dir: here\n")
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss}) + "\n")
    output = str(tmp_path / "both.html")
    assert end(["report", str(tmp_path / "a"), str(tmp_path / "b"), "--output", output]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    assert "<h1>Runs a, b</h1>" in (tmp_path / "both.html").read_text()


@pytest.mark.fast
def test_a_directory_that_is_no_run_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert end(["report", str(tmp_path / "absent")]) == 2
    assert capsys.readouterr().err.startswith(f"lmjax: {tmp_path / 'absent'}: no such run")
