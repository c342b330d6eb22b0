"""The manifest finds what changed, itself included, and says what it is too old to read."""

import hashlib
import json

import pytest
from etils import epath

from lmjax.checkpoint.manifest import (
    MANIFEST,
    FileEntry,
    LeafEntry,
    Manifest,
    describe_files,
    list_steps,
    read_manifest,
    verify,
    write_manifest,
)
from lmjax.errors import InputError

pytestmark = pytest.mark.fast


@pytest.fixture
def step_directory(tmp_path):
    directory = epath.Path(tmp_path) / "7"
    (directory / "params").mkdir(parents=True)
    (directory / "params" / "data").write_bytes(b"abc")
    (directory / "top").write_bytes(b"")
    leaves = {"params/w": LeafEntry((3, 1), "uint8")}
    manifest = Manifest(step=7, metadata={"a": [1, None]}, leaves=leaves, files=describe_files(directory))
    write_manifest(directory, manifest)
    return directory


def test_what_is_written_is_read(step_directory):
    manifest = read_manifest(step_directory.parent, 7)
    assert manifest == Manifest(
        step=7,
        metadata={"a": [1, None]},
        leaves={"params/w": LeafEntry((3, 1), "uint8")},
        files={
            "params/data": FileEntry(3, hashlib.sha256(b"abc").hexdigest()),
            "top": FileEntry(0, hashlib.sha256(b"").hexdigest()),
        },
    )
    assert manifest.of_part("params") == ["params/data", "top"]
    assert manifest.of_part("optimizer") == ["top"]
    assert list_steps(step_directory.parent) == [7]
    verdict = verify(step_directory.parent, 7)
    assert (verdict.num_files, verdict.num_bytes, verdict.problems) == (2, 3, ())
    assert [path.name for path in step_directory.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"abd", "params/data: damaged: its SHA-256 does not match"),
        (b"ab", "params/data: 2 bytes where 3 were written"),
        (None, "params/data: missing"),
    ],
)
def test_a_changed_file_is_named(step_directory, content, problem):
    file = step_directory / "params" / "data"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert verify(step_directory.parent, 7).problems == (problem,)


def test_the_manifest_does_not_change_unseen(step_directory):
    path = step_directory / MANIFEST
    whole, manifest = path.read_bytes(), read_manifest(step_directory.parent, 7)
    for position in range(0, len(whole), 5):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            assert read_manifest(step_directory.parent, 7) == manifest  # a blank that became another blank
        except InputError as error:
            assert str(path) in str(error)  # noqa: PT017
    for length in range(0, len(whole), 50):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="not readable"):
            read_manifest(step_directory.parent, 7)


def test_a_missing_manifest_is_an_unfinished_save(step_directory):
    (step_directory / MANIFEST).unlink()
    with pytest.raises(InputError, match="the save was stopped before it was finished"):
        read_manifest(step_directory.parent, 7)
    assert len(verify(step_directory.parent, 7).problems) == 1


def test_a_step_in_the_directory_of_another_is_refused(step_directory):
    step_directory.rename(step_directory.parent / "8")
    with pytest.raises(InputError, match="of step 7, but it lies in the directory of step 8"):
        read_manifest(step_directory.parent, 8)


def test_a_newer_format_is_refused(step_directory):
    content = json.loads((step_directory / MANIFEST).read_text())
    del content["sha256"]
    content["format_version"] = 2
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (step_directory / MANIFEST).write_text(json.dumps({"sha256": digest, **content}))
    with pytest.raises(InputError, match="format version 2; this lmjax reads up to 1: update lmjax"):
        read_manifest(step_directory.parent, 7)


def test_only_numbered_directories_are_steps(tmp_path):
    for name in ("10", "9", "11.orbax-checkpoint-tmp", "notes"):
        (tmp_path / name).mkdir()
    assert list_steps(tmp_path) == [9, 10]
    assert list_steps(tmp_path / "absent") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot list the checkpoints"):
        list_steps(tmp_path / "file")
