"""What a run writes: rows that a resumed run does not write twice."""

import json
from pathlib import Path
from typing import Any

import pytest

from lmjax.train.config import LoggingConfig
from lmjax.train.metrics import Recorder, keep_rows_until, last_step, progress_text


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, "tokens_per_second": 10.0, "mfu": None, "memory_bytes": None} | {
        "data_wait_share": 0.0
    }


@pytest.mark.fast
def test_rows_after_the_step_and_a_cut_last_line_are_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    rows = [row(step) | {"text": "one\u2028line\x85"} for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + '{"step": 4, "lo')
    assert last_step(path) == 3
    assert keep_rows_until(path, 2) == 3
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == rows[:2]
    whole = json.dumps({"step": 2, "text": "é"}, ensure_ascii=False).encode()
    for cut in (whole, whole[: whole.index(b"\xa9")]):  # without its newline, and within a character
        path.write_bytes(b'{"step": 1}\n' + cut)
        assert keep_rows_until(path, 2) == -1
        assert path.read_bytes() == b'{"step": 1}\n'
    keep_rows_until(tmp_path / "absent.jsonl", 2)
    assert last_step(tmp_path / "absent.jsonl") == -1
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.fast
def test_a_recorder_goes_on_where_the_run_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = LoggingConfig(progress="lines")
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        recorder = Recorder(tmp_path, config, start=start, steps=4, primary=True)
        for step in steps:
            recorder.train_row(row(step), last=step == 4)
        recorder.message(f"said at {start}")
        recorder.close()
    written = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written == [1, 2, 3, 4]
    assert "said at 2" in (tmp_path / "log.txt").read_text()
    assert "step 4  loss 1.0000" in capsys.readouterr().out


@pytest.mark.fast
def test_a_run_that_begins_again_writes_its_evaluation_of_step_0_once(tmp_path: Path):
    for start, written in ((0, 1), (0, 1), (1, 2)):
        recorder = Recorder(tmp_path, LoggingConfig(), start=start, steps=4, primary=True)
        recorder.evaluation_row({"step": start, "eval_loss": 1.0, "perplexity": 2.0, "unigram_loss": 3.0})
        recorder.sample_rows([{"step": start, "text": "a"}])
        recorder.close()
        for name in ("metrics.jsonl", "samples.jsonl"):
            assert len((tmp_path / name).read_text().splitlines()) == written


@pytest.mark.fast
def test_a_process_that_is_not_the_first_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recorder = Recorder(tmp_path, LoggingConfig(), start=0, steps=4, primary=False)
    recorder.train_row(row(1), last=True)
    recorder.sample_rows([{"step": 1}])
    recorder.message("said")
    recorder.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.fast
def test_a_recorder_knows_what_was_evaluated_up_to_its_start(tmp_path: Path):
    evaluations = [
        {"step": step, "eval_loss": 5.0 - step, "perplexity": 2.0, "unigram_loss": 3.0} for step in (0, 2, 4)
    ]
    rows = [evaluations[0], row(1), row(2), evaluations[1], row(3), row(4), evaluations[2]]
    for start, steps, last in ((4, [0, 2, 4], 4), (3, [0, 2], 2), (0, [], -1)):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        recorder = Recorder(tmp_path, LoggingConfig(), start=start, steps=4, primary=True)
        recorder.close()
        assert recorder.evaluations == [(step, 5.0 - step) for step in steps]
        assert recorder.last_evaluated == last
        assert recorder.dropped == (4 if start < 4 else -1)
    (tmp_path / "samples.jsonl").write_text(json.dumps({"step": 2, "text": "a"}) + "\n")
    recorder = Recorder(tmp_path, LoggingConfig(), start=3, steps=4, primary=True)
    recorder.close()
    assert recorder.last_evaluated == 2, "a run without held-out rows has samples alone"


@pytest.mark.fast
def test_a_progress_line_leaves_out_what_is_not_known():
    assert progress_text(row(1)) == "loss 1.0000  10 tokens/s  waited 0.0% for data"
    known = {"mfu": 0.4567, "memory_bytes": 3 * 2**29, "data_wait_share": 0.0123}
    assert progress_text(row(1) | known) == "loss 1.0000  10 tokens/s  MFU 45.7%  1.5 GiB  waited 1.2% for data"
