"""Checkpoints in an object store: bit-equal after a restore, and never half of one, wherever a save was killed."""

import typing

import pytest
from etils import epath

from lmjax import paths
from lmjax.checkpoint import save as saving
from lmjax.checkpoint import store
from lmjax.checkpoint.manifest import MANIFEST, UPLOADING, list_steps, read_manifest, verify
from lmjax.checkpoint.restore import restore
from lmjax.checkpoint.save import CheckpointConfig, Saver
from lmjax.errors import InputError


class Killed(BaseException):
    """What no handler of an error catches."""


@pytest.fixture
def save(bucket, mesh, make_state):
    """Save state number ``step`` in the bucket's run, as a new process would, and return where."""
    directory = f"{bucket}/run/checkpoints"

    def run(*steps: int, keep_last: int = 2) -> epath.Path:
        saver = Saver(directory, CheckpointConfig(keep_last=keep_last))
        try:
            for step in steps:
                saver.save(step, make_state(mesh, step), {"step_was": step})
                saver.wait()
        finally:
            saver.close()
        return epath.Path(directory)

    return run


@pytest.fixture
def target(mesh_of, make_state, make_target):
    """The state on another mesh than it was saved on."""
    return make_target(make_state(mesh_of(2, 2, 2), 1), mesh_of(1, 4, 2))


def objects(directory: epath.Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_restored_on_another_mesh_is_what_was_saved(save, target, make_state, mesh, same_bits, tmp_path):
    directory = save(1, 2, 3)
    assert list_steps(directory) == [2, 3]
    assert UPLOADING not in objects(directory / "3")
    assert verify(directory, 3).problems == ()
    found = restore(directory, target)
    assert found is not None
    assert (found.step, found.metadata, found.skipped) == (3, {"step_was": 3}, ())
    assert same_bits(found.state, make_state(mesh, 3))
    assert not same_bits(found.state, make_state(mesh, 2))
    # what was staged and what was fetched is gone from this machine
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.parent.name != "locks"]
    assert left == []


def test_a_part_is_fetched_alone(save, target, make_state, mesh, same_bits, monkeypatch):
    directory = save(1)
    fetched = []
    whole = paths.download
    monkeypatch.setattr(paths, "download", lambda source, to: fetched.append(source) or whole(source, to))
    found = restore(directory, target["params"], part="params")
    assert found is not None
    assert same_bits(found.state, make_state(mesh, 1)["params"])
    assert fetched
    assert not any("optimizer" in str(source) for source in fetched)


def test_a_damaged_object_is_found_and_the_older_step_taken(save, target, make_state, mesh, same_bits):
    directory = save(1, 2)
    files = read_manifest(directory, 2).files
    sha256 = next(entry.sha256 for name, entry in files.items() if "/d/" in name)
    for name in [name for name, entry in files.items() if entry.sha256 == sha256]:  # else one stands in for the other
        content = bytearray((directory / "2" / name).read_bytes())
        content[len(content) // 2] ^= 1
        (directory / "2" / name).write_bytes(bytes(content))
    found = restore(directory, target)
    assert found is not None
    assert found.step == 1
    assert same_bits(found.state, make_state(mesh, 1))
    assert [(skipped.step, "damaged" in skipped.why) for skipped in found.skipped] == [(2, True)]
    (directory / "1" / next(iter(read_manifest(directory, 1).files))).unlink()
    with pytest.raises(InputError, match="no good checkpoint"):
        restore(directory, target)


def kill(monkeypatch: pytest.MonkeyPatch, module: typing.Any, name: str, after: int) -> None:
    """Let the function be called ``after`` times, and kill the process that calls it once more."""
    function, calls = getattr(module, name), []

    def counted(*arguments: typing.Any, **options: typing.Any) -> typing.Any:
        if len(calls) == after:
            raise Killed
        calls.append(name)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, counted)


@pytest.mark.parametrize(
    ("module", "name", "after", "saved"),
    [(paths, "upload", 0, 0), (paths, "upload", 7, 1), (saving, "write_manifest", 0, 1)],
    ids=["before the first file of the first step", "between files", "before the manifest"],
)
def test_killed_before_the_manifest_there_is_no_checkpoint(save, target, monkeypatch, module, name, after, saved):
    directory = save(*range(1, saved + 1))
    with monkeypatch.context() as patch:
        kill(patch, module, name, after)
        with pytest.raises(Killed):
            save(2)
    assert (directory / "2" / UPLOADING).exists()
    assert not (directory / "2" / MANIFEST).exists()
    assert list_steps(directory) == list(range(1, saved + 1))
    found = restore(directory, target)
    assert (None if found is None else (found.step, found.skipped)) == ((1, ()) if saved else None)
    assert save(2) == directory  # started again, it removes what the killed one left
    assert list_steps(directory) == [*range(1, saved + 1), 2]
    assert UPLOADING not in objects(directory / "2")


def test_killed_after_the_manifest_the_checkpoint_counts(save, target, monkeypatch):
    directory = save(1)
    with monkeypatch.context() as patch:
        kill(patch, store, "end_upload", 0)
        with pytest.raises(Killed):
            save(2)
    assert list_steps(directory) == [1, 2]
    found = restore(directory, target)
    assert found is not None
    assert (found.step, found.skipped) == (2, ())


def test_killed_while_an_old_step_is_removed_nothing_of_it_is_a_checkpoint(save, target, monkeypatch):
    directory = save(1)
    with monkeypatch.context() as patch:
        kill(patch, epath.gpath.PosixGPath, "rmtree", 2)  # of the staged files of step 2, then of a part of step 1
        with pytest.raises(Killed):
            save(2, keep_last=1)
    assert len(objects(directory / "1")) > 1
    assert list_steps(directory) == [2]
    save()
    assert objects(directory) == ["2"]


def test_a_lost_manifest_is_damage_and_not_a_step_that_never_was(save, target):
    directory = save(1)
    (directory / "1" / MANIFEST).unlink()
    with pytest.raises(InputError, match="no good checkpoint"):
        restore(directory, target)


def test_a_bucket_that_is_not_there_is_refused_before_anything_is_computed(bucket):
    with pytest.raises(InputError, match=r"the object store cannot be used: .*bucket does not exist"):
        Saver(f"{bucket}-other/run/checkpoints", CheckpointConfig())
