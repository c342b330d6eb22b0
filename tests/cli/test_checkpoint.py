"""``lmjax checkpoint list`` and ``verify``: what they print, and the exit code when a file has changed."""

import json

import pytest
from etils import epath

from lmjax.checkpoint.manifest import LeafEntry, Manifest, describe_files, write_manifest
from lmjax.cli import checkpoint
from lmjax.errors import InputError

pytestmark = pytest.mark.fast


@pytest.fixture
def run(tmp_path):
    """A run directory with the whole step 10, and step 20, whose save was cut short."""
    for step in (10, 20):
        directory = epath.Path(tmp_path) / "checkpoints" / str(step)
        (directory / "params").mkdir(parents=True)
        (directory / "params" / "data").write_bytes(b"abc")
    directory = epath.Path(tmp_path) / "checkpoints" / "10"
    leaves = {"params/w": LeafEntry((3,), "uint8")}
    write_manifest(directory, Manifest(step=10, metadata={}, leaves=leaves, files=describe_files(directory)))
    return tmp_path


def test_list_tells_which_saves_were_finished(run, capsys):
    checkpoint.list_(str(run), as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["directory"] == str(run / "checkpoints")
    whole, cut = printed["checkpoints"]
    assert whole == {"step": 10, "files": 1, "bytes": 3, "arrays": 1, "problem": None}
    assert (cut["step"], cut["files"]) == (20, None)
    assert "the save was stopped before it was finished" in cut["problem"]
    checkpoint.list_(str(run / "checkpoints"))
    assert "stopped before it was finished" in capsys.readouterr().out


def test_verify_passes_a_good_step_and_refuses_the_others(run, capsys):
    checkpoint.verify(str(run), step=10, as_json=True)
    good = {"step": 10, "files": 1, "bytes": 3, "problems": []}
    assert json.loads(capsys.readouterr().out)["checkpoints"] == [good]
    with pytest.raises(InputError, match="not good: step 20"):
        checkpoint.verify(str(run))
    capsys.readouterr()
    (run / "checkpoints" / "10" / "params" / "data").write_bytes(b"abd")
    with pytest.raises(InputError, match="not good: step 10, 20"):
        checkpoint.verify(str(run), as_json=True)
    found = json.loads(capsys.readouterr().out)["checkpoints"][0]
    assert found["problems"] == ["params/data: damaged: its SHA-256 does not match"]


@pytest.mark.parametrize(("name", "problem"), [("absent", "no such directory"), ("empty", "no checkpoints in it")])
def test_a_directory_without_checkpoints_is_refused(tmp_path, name, problem):
    (tmp_path / "empty").mkdir()
    for command in (checkpoint.list_, checkpoint.verify):
        with pytest.raises(InputError, match=problem):
            command(str(tmp_path / name))


def test_a_step_that_is_not_there_is_refused(run):
    with pytest.raises(InputError, match="no checkpoint of step 5. Checkpoints here: 10, 20"):
        checkpoint.verify(str(run), step=5)
