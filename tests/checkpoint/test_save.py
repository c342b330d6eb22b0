"""A save is whole or not there, and what was saved before stays until it is whole."""

import errno
import os
import resource
import subprocess
import sys
import textwrap
import typing
from pathlib import Path

import jax
import numpy as np
import pytest

from lmjax.checkpoint import save as saving
from lmjax.checkpoint.manifest import list_steps, read_manifest, verify
from lmjax.checkpoint.restore import Restored, restore
from lmjax.checkpoint.save import CheckpointConfig, Saver
from lmjax.errors import InputError


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def save_and_wait(saver: Saver, step: int, state: typing.Any) -> None:
    saver.save(step, state, {})
    saver.wait()


def read(*arguments: typing.Any, **options: typing.Any) -> Restored:
    found = restore(*arguments, **options)
    assert found is not None
    return found


def test_the_newest_are_kept_each_whole(tmp_path, mesh, make_state):
    saver = Saver(str(tmp_path / "run" / "checkpoints"), CheckpointConfig(keep_last=2))
    for step in (5, 9, 10, 12):
        saver.save(step, make_state(mesh, step), {"step_was": step})
        saver.wait()
        assert verify(saver.directory, step).problems == ()
    saver.close()
    assert list_steps(saver.directory) == [10, 12]
    assert verify(saver.directory, 10).problems == ()
    assert names(tmp_path / "run" / "checkpoints") == ["10", "12"]


def test_a_path_relative_to_the_working_directory(tmp_path, mesh, make_state, make_target, same_bits, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saver = Saver("run/checkpoints", CheckpointConfig())
    saver.save(1, make_state(mesh, 1), {})
    saver.close()
    found = read("run/checkpoints", make_target(make_state(mesh, 1), mesh))
    assert same_bits(found.state, make_state(mesh, 1))
    assert names(tmp_path / "run" / "checkpoints") == ["1"]


def test_an_old_step_goes_only_after_the_manifest_of_the_new_one(tmp_path, mesh, make_state, monkeypatch):
    seen = []

    def write(directory, manifest):
        seen.append(list_steps(tmp_path))
        original(directory, manifest)

    original = saving.write_manifest
    monkeypatch.setattr(saving, "write_manifest", write)
    saver = Saver(str(tmp_path), CheckpointConfig(keep_last=1))
    for step in (1, 2):
        saver.save(step, make_state(mesh, step), {})
    saver.close()
    assert seen == [[1], [1, 2]]
    assert list_steps(tmp_path) == [2]


def test_the_manifest_tells_metadata_and_arrays_without_restoring(saved):
    manifest = read_manifest(saved, 2)
    assert manifest.metadata == {"fingerprint": "f", "step_was": 2}
    assert manifest.leaves["params/mlp"].shape == (16, 8)
    assert manifest.leaves["params/mlp"].dtype == "bfloat16"
    assert "optimizer/0/mu/table" in manifest.leaves
    assert manifest.num_bytes == sum(path.stat().st_size for name in manifest.files for path in [saved / "2" / name])


def test_what_is_donated_after_save_returned_is_saved_as_it_was(tmp_path, mesh, make_state, make_target, same_bits):
    state, metadata = make_state(mesh, 3, dim=1024), {"list": [1]}
    saver = Saver(str(tmp_path), CheckpointConfig())
    saver.save(3, state, metadata)
    metadata["list"].append(2)
    changed = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(state)
    jax.block_until_ready(changed)
    saver.close()
    found = read(tmp_path, make_target(changed, mesh))
    assert same_bits(found.state, make_state(mesh, 3, dim=1024))
    assert not same_bits(found.state, changed)
    assert found.metadata == {"list": [1]}


def test_a_good_step_is_left_as_it_is_and_a_damaged_one_replaced(tmp_path, mesh, make_state):
    for _ in range(2):  # by the saver that wrote it, and by the saver of a resumed run
        saver = Saver(str(tmp_path), CheckpointConfig(keep_last=1))
        for _ in range(2):
            saver.save(4, make_state(mesh, 4), {})
            saver.wait()
            inode = (tmp_path / "4").stat().st_ino
        saver.close()
    assert (tmp_path / "4").stat().st_ino == inode
    (tmp_path / "4" / "params" / "_METADATA").write_bytes(b"")
    saver = Saver(str(tmp_path), CheckpointConfig(keep_last=1))
    saver.save(4, make_state(mesh, 4), {})
    saver.close()
    assert verify(tmp_path, 4).problems == ()


def test_a_disk_that_fills_up_is_told_and_leaves_the_last_good_step(tmp_path, mesh, make_state, make_target, same_bits):
    saver = Saver(str(tmp_path), CheckpointConfig(keep_last=1))
    saver.save(1, make_state(mesh, 1), {})
    saver.wait()
    large = make_state(mesh, 2, dim=1 << 16)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))  # less than one device's share of one array
    try:
        with pytest.raises(InputError, match="saving checkpoint 2 failed(.|\n)*Saved checkpoints, untouched: 1"):
            save_and_wait(saver, 2, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list_steps(tmp_path) == [1]
    assert same_bits(read(tmp_path, make_target(make_state(mesh, 1), mesh)).state, make_state(mesh, 1))
    saver.save(3, large, {})
    saver.close()
    assert list_steps(tmp_path) == [3]
    assert verify(tmp_path, 3).problems == ()


def test_a_manifest_that_cannot_be_written_is_told_by_the_next_call(
    tmp_path, mesh, make_state, make_target, monkeypatch
):
    def fail(directory, manifest):
        raise OSError(errno.ENOSPC, "No space left on device")

    saver = Saver(str(tmp_path), CheckpointConfig(keep_last=1))
    saver.save(1, make_state(mesh, 1), {})
    saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_manifest", fail)
        saver.save(2, make_state(mesh, 2), {})
        with pytest.raises(InputError, match="saving checkpoint 2 failed: .*No space left"):
            saver.save(3, make_state(mesh, 3), {})
        closed = Saver(str(tmp_path), CheckpointConfig(keep_last=1))
        closed.save(2, make_state(mesh, 2), {})
        with pytest.raises(InputError, match="saving checkpoint 2 failed: .*No space left"):
            closed.close()
    assert read(tmp_path, make_target(make_state(mesh, 1), mesh)).step == 1
    saver.save(3, make_state(mesh, 3), {})
    saver.close()
    assert names(tmp_path) == ["3"]


KILLED_BEFORE_THE_COMMIT = """
    import os, sys
    import jax
    import orbax.checkpoint as ocp
    from lmjax.checkpoint.save import CheckpointConfig, Saver

    state = {"params": {"w": jax.numpy.arange(8.0)}, "step": jax.numpy.int32(1)}
    saver = Saver(sys.argv[1], CheckpointConfig(keep_last=1))
    saver.save(1, state, {})
    saver.wait()
    ocp.PyTreeCheckpointHandler.finalize = lambda *_, **__: os._exit(9)
    saver.save(2, state, {})
    saver.wait()
"""


def test_killed_while_saving(tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(KILLED_BEFORE_THE_COMMIT), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert names(tmp_path) == ["1", "2.orbax-checkpoint-tmp"]
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = {
        "params": {"w": jax.ShapeDtypeStruct((8,), "float32", sharding=sharding)},
        "step": jax.ShapeDtypeStruct((), "int32", sharding=sharding),
    }
    found = read(tmp_path, target)
    assert (found.step, found.skipped) == (1, ())
    assert np.array_equal(found.state["params"]["w"], np.arange(8.0))
    saver = Saver(str(tmp_path), CheckpointConfig(keep_last=1))
    assert names(tmp_path) == ["1"]
    saver.save(2, found.state, {})
    saver.close()
    assert names(tmp_path) == ["2"]


@pytest.mark.parametrize(("point", "step"), [("write_manifest", 1), ("_remove_old", 2)])
def test_killed_between_the_commit_and_the_end(
    tmp_path, mesh, make_state, make_target, same_bits, monkeypatch, point, step
):
    saver = Saver(str(tmp_path), CheckpointConfig(keep_last=1))
    saver.save(1, make_state(mesh, 1), {})
    saver.wait()
    with monkeypatch.context() as patch:
        if point == "write_manifest":
            patch.setattr(saving, "_remove_old", lambda *_: None)
        patch.setattr(saving, point, lambda *_: None)
        saver.save(2, make_state(mesh, 2), {})
        saver.close()
    assert names(tmp_path) == ["1", "2"]
    found = read(tmp_path, make_target(make_state(mesh, 1), mesh))
    assert found.step == step
    assert same_bits(found.state, make_state(mesh, step))
    assert [skipped.step for skipped in found.skipped] == ([2] if step == 1 else [])
    saver = Saver(str(tmp_path), CheckpointConfig(keep_last=1))
    saver.save(2, make_state(mesh, 2), {})
    saver.save(3, make_state(mesh, 3), {})
    saver.close()
    assert names(tmp_path) == ["3"]


@pytest.mark.fast
def test_a_place_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot keep checkpoints here"):
        Saver(str(tmp_path / "file" / "checkpoints"), CheckpointConfig())


@pytest.mark.fast
@pytest.mark.parametrize("field", ["every_steps", "keep_last"])
def test_no_fewer_than_one(field):
    with pytest.raises(InputError, match=f"checkpoint.{field} is 0; it must be 1 or more"):
        CheckpointConfig(**{field: 0})
