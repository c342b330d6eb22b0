"""Event files hold every row once, whatever stopped the run, and Weights & Biases is given the same numbers."""

import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto import event_pb2

from lmjax.errors import InputError
from lmjax.train.config import LoggingConfig, WandbConfig
from lmjax.train.tracking import TensorBoard, Wandb, check_trackers, scalars

pytestmark = pytest.mark.fast

TRAIN = {"step": 3, "loss": 2.5, "mfu": None, "batch_hash": "ab", "mixture": {"code": 5, "prose": 3}, "time": 100.5}
EVALUATION = {"step": 3, "eval_loss": 2.25, "tokens": 7, "time": 101.0}


def records(file: Path) -> list[bytes]:
    """The payloads of a TFRecord file, whose checksums are verified (masked CRC-32C of the length and of the data)."""

    def masked(data: bytes) -> int:
        crc = crc32c(data) & 0xFFFFFFFF
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    content, found, at = file.read_bytes(), [], 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        assert struct.unpack_from("<I", content, at + 8) == (masked(content[at : at + 8]),)
        payload = content[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", content, at + 12 + length) == (masked(payload),)
        found.append(payload)
        at += length + 16
    return found


def events(directory: Path) -> list[tuple[int, str, float]]:
    """Step, tag and value of every scalar in the event files of ``directory``, in the order of writing."""
    found = []
    for file in sorted(directory.glob("events.out.tfevents.*")):
        for payload in records(file):
            event = event_pb2.Event.FromString(payload)  # pyright: ignore[reportAttributeAccessIssue]
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_scalars_are_the_numbers_of_a_row_by_its_kind():
    assert scalars(TRAIN) == {"train/loss": 2.5, "mixture/code": 5.0, "mixture/prose": 3.0}
    router = {"router": {"3": {"entropy": 1.5, "load": [0.25, 0.75]}}}
    assert scalars(TRAIN | router) == scalars(TRAIN) | {"router/3/entropy": 1.5}
    assert scalars(EVALUATION) == {"evaluation/eval_loss": 2.25, "evaluation/tokens": 7.0}


def test_an_event_file_holds_each_row_with_its_step_and_time(tmp_path: Path):
    board = TensorBoard(tmp_path / "tensorboard", [])
    board.add(TRAIN)
    board.add(EVALUATION)
    board.close(failed=False)
    assert events(tmp_path / "tensorboard") == [
        (3, "train/loss", 2.5),
        (3, "mixture/code", 5.0),
        (3, "mixture/prose", 3.0),
        (3, "evaluation/eval_loss", 2.25),
        (3, "evaluation/tokens", 7.0),
    ]
    (file,) = (tmp_path / "tensorboard").iterdir()
    version, session, train, _ = (
        event_pb2.Event.FromString(payload)  # pyright: ignore[reportAttributeAccessIssue]
        for payload in records(file)
    )
    assert version.file_version == "brain.Event:2"
    assert session.session_log.status == 1
    assert train.wall_time == 100.5


def test_a_run_that_goes_on_has_no_step_twice_and_loses_none(tmp_path: Path):
    """The first start wrote steps 1 to 3, of which 3 came after the checkpoint, and 2 never reached the disk."""
    rows = [{"step": step, "loss": float(step)} for step in (1, 2)]
    before = TensorBoard(tmp_path, [])
    before.add(rows[0])
    before.add({"step": 3, "loss": 99.0})
    before.close(failed=False)
    assert [step for step, _, _ in events(tmp_path)] == [1, 3]
    after = TensorBoard(tmp_path, rows)
    after.add({"step": 3, "loss": 3.0})
    after.close(failed=False)
    assert events(tmp_path) == [(step, "train/loss", float(step)) for step in (1, 2, 3)]


class FakeWandb(ModuleType):
    """The part of the package that is used."""

    class Error(Exception):
        pass

    def __init__(self, refusal: str | None = None):
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended: list[int] = []
        self.refusal = refusal

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **options: Any) -> SimpleNamespace:
        if self.refusal is not None:
            raise self.Error(self.refusal)
        self.started.append(options)
        return SimpleNamespace(
            log=lambda values, step: self.logged.append((step, values)),
            finish=lambda exit_code: self.ended.append(exit_code),
        )


def test_wandb_is_given_the_same_numbers_under_an_id_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_dir = tmp_path / "first"
    for _ in range(2):
        run = Wandb(WandbConfig(project="p", mode="offline"), run_dir, "abc", {"train": {"steps": 3}})
        run.add(TRAIN)
        run.close(failed=True)
    assert [start["id"] for start in fake.started] == ["abc", "abc"]
    start = fake.started[0]
    assert (start["project"], start["name"], start["mode"], start["resume"]) == ("p", "first", "offline", "allow")
    assert start["config"] == {"train": {"steps": 3}}
    assert fake.logged == [(3, scalars(TRAIN))] * 2
    assert fake.ended == [1, 1]


def test_what_wandb_refuses_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("no API key"))
    with pytest.raises(InputError, match=r"logging.wandb: no API key. Log in"):
        Wandb(WandbConfig(project="p"), tmp_path, "abc", {})


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'lmjax\[wandb\]'"):
        check_trackers(LoggingConfig(wandb=WandbConfig(project="p")))
    check_trackers(LoggingConfig())
