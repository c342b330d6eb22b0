"""What is restored is what was saved, bit for bit, on any mesh; and a damaged file is never read."""

import logging
import typing
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lmjax.checkpoint.manifest import MANIFEST
from lmjax.checkpoint.restore import Restored, restore
from lmjax.checkpoint.save import CheckpointConfig, Saver
from lmjax.errors import InputError


def read(*arguments: typing.Any, **options: typing.Any) -> Restored:
    found = restore(*arguments, **options)
    assert found is not None
    return found


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8), (8, 1, 1), (1, 1, 1), (1, 4, 2)])
def test_bits_and_shardings_on_any_mesh(saved, mesh, mesh_of, make_state, make_target, same_bits, shape):
    state = make_state(mesh, 2)
    target = make_target(state, mesh_of(*shape))
    with jax.set_mesh(mesh_of(*shape)):
        found = read(saved, target)
    assert (found.step, found.skipped) == (2, ())
    assert found.metadata == {"fingerprint": "f", "step_was": 2}
    assert same_bits(found.state, state)
    assert not same_bits(found.state, make_state(mesh, 1))
    for wanted, array in zip(jax.tree.leaves(target), jax.tree.leaves(found.state), strict=True):
        assert array.sharding == wanted.sharding
        assert array.sharding.mesh.axis_types == wanted.sharding.mesh.axis_types
        assert array.committed


def test_an_older_step_by_its_number(saved, mesh, make_state, make_target, same_bits):
    found = read(saved, make_target(make_state(mesh, 1), mesh), step=1)
    assert found.step == 1
    assert same_bits(found.state, make_state(mesh, 1))


def test_a_step_that_is_not_there_lists_those_that_are(saved, mesh, make_state, make_target):
    with pytest.raises(InputError, match="no checkpoint of step 7. Checkpoints here: 1, 2"):
        restore(saved, make_target(make_state(mesh, 1), mesh), step=7)


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [flip, lambda content: content[:-1], None], ids=["flip", "truncate", "delete"])
def test_damage_to_any_file_is_found_and_the_older_step_is_taken(
    saved, mesh, make_state, make_target, same_bits, damage, caplog
):
    target, older = make_target(make_state(mesh, 2), mesh), make_state(mesh, 1)
    files = [path for path in (saved / "2").rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 10
    for file in files:
        content = file.read_bytes()
        if damage:
            file.write_bytes(damage(content))
        else:
            file.unlink()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lmjax"):
            found = read(saved, target)
        file.write_bytes(content)
        assert found.step == 1
        assert same_bits(found.state, older)
        assert [skipped.step for skipped in found.skipped] == [2]
        assert str(file.relative_to(saved / "2")) in found.skipped[0].why
        assert "checkpoint 2" in caplog.text
        assert "restoring the older checkpoint 1" in caplog.text
    assert read(saved, target).step == 2


def test_a_file_that_was_not_saved_makes_a_step_not_good(saved, mesh, make_state, make_target):
    extra = saved / "2" / "params" / "stray"
    extra.write_bytes(b"?")
    found = read(saved, make_target(make_state(mesh, 2), mesh))
    extra.unlink()
    assert found.step == 1
    assert "params/stray: not in the manifest" in found.skipped[0].why


def test_orbax_alone_restores_a_flipped_bit_without_an_error(tmp_path, rng):
    bits = rng.integers(0, 1 << 32, 1 << 14, np.uint32)  # random, so that compression stores the bytes as they are
    state = {"params": {"bits": jax.device_put(bits, jax.devices()[0])}}
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    saver = Saver(str(tmp_path), CheckpointConfig())
    saver.save(1, state, {})
    saver.close()

    def plain() -> np.ndarray:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            arguments = {"params/bits": ocp.ArrayRestoreArgs(restore_type=np.ndarray)}
            items = ocp.args.Composite(params=ocp.args.PyTreeRestore(restore_args=arguments))
            return checkpointer.restore(tmp_path / "1", args=items)["params"]["params/bits"]

    assert np.array_equal(plain(), bits)
    word = bits[1000:1004].tobytes()
    (file,) = [path for path in (tmp_path / "1").rglob("*") if path.is_file() and word in path.read_bytes()]
    file.write_bytes(file.read_bytes().replace(word, flip(word)))
    (changed,) = np.flatnonzero(plain() != bits)
    assert 1000 <= changed < 1004
    with pytest.raises(InputError, match="damaged: its SHA-256 does not match"):
        restore(tmp_path, target)


def test_steps_of_which_none_is_good_are_never_an_empty_directory(tmp_path, mesh, make_state, make_target):
    saver = Saver(str(tmp_path), CheckpointConfig(keep_last=3))
    for step in (1, 2, 3):
        saver.save(step, make_state(mesh, step), {})
    saver.close()
    (tmp_path / "1" / MANIFEST).unlink()
    (tmp_path / "2" / MANIFEST).write_text("{}")
    (tmp_path / "3" / "params" / "_METADATA").unlink()
    with pytest.raises(InputError) as error:
        restore(tmp_path, make_target(make_state(mesh, 1), mesh))
    for line in ("no good checkpoint", "step 1: ", "step 2: ", "step 3: params/_METADATA: missing"):
        assert line in str(error.value)


@pytest.mark.parametrize("made", ["nothing", "directory", "killed save"])
def test_no_checkpoint_at_all_is_none(tmp_path, mesh, make_state, make_target, made):
    directory = tmp_path / "checkpoints"
    if made != "nothing":
        directory.mkdir()
    if made == "killed save":
        (directory / "5.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    assert restore(directory, make_target(make_state(mesh, 1), mesh)) is None


def test_one_part_reads_and_verifies_only_its_own_files(saved, mesh, mesh_of, make_state, make_target, same_bits):
    state = make_state(mesh, 2)
    target = make_target(state["params"], mesh_of(1, 1, 1))
    hidden = Path(str(saved) + "-optimizer")
    (saved / "2" / "optimizer").rename(hidden)
    found = read(saved, target, part="params")
    whole = read(saved, make_target(state, mesh))
    hidden.rename(saved / "2" / "optimizer")
    assert found.step == 2
    assert same_bits(found.state, state["params"])
    assert whole.step == 1
    table = saved / "2" / "params" / "_METADATA"
    content = table.read_bytes()
    table.write_bytes(flip(content))
    older = read(saved, target, part="params")
    table.write_bytes(content)
    assert older.step == 1


def test_other_arrays_than_those_wanted_are_named(saved, mesh, make_state, make_target):
    state = make_state(mesh, 2)
    wide = make_target({**state, "params": make_state(mesh, 2, dim=32)["params"]}, mesh)
    with pytest.raises(InputError, match=r"params/mlp: bfloat16\[16,8\] in the checkpoint, bfloat16\[32,8\] wanted"):
        restore(saved, wide)
    dtype = make_target({**state, "step": state["step"].astype("float32")}, mesh)
    with pytest.raises(InputError, match=r"step: int32\[\] in the checkpoint, float32\[\] wanted"):
        restore(saved, dtype)
    missing = make_target({key: state[key] for key in ("params", "step")}, mesh)
    with pytest.raises(InputError, match=r"optimizer/0/count: int32\[\] in the checkpoint, none wanted"):
        restore(saved, missing)
    more = make_target({**state, "extra": state["step"]}, mesh)
    with pytest.raises(InputError, match=r"1 arrays .*\n  extra: none in the checkpoint, int32\[\] wanted"):
        restore(saved, more)
