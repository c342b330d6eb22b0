"""A step that is written and read in slices is one like any other."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.checkpoint import layout, slices
from lmjax.checkpoint.manifest import list_steps, verify
from lmjax.checkpoint.restore import restore
from lmjax.checkpoint.save import CheckpointConfig, Saver
from lmjax.checkpoint.slices import chunk_shape, open_step, slice_bytes, write_step
from lmjax.errors import InputError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = {"embed/table": (100, 33), "segments/0/up/kernel": (3, 40, 50), "norm/scale": (7,)}


@dataclasses.dataclass
class Array:
    """An array, and what was read of it."""

    values: np.ndarray
    order: str = "C"
    reads: list[Any] = dataclasses.field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def stored(self) -> np.dtype:
        return self.values.dtype

    def read_stored(self, index: Any = ()) -> np.ndarray:
        self.reads.append(index)
        return self.values[index].copy()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(slices, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(slices, "MIN_ROW_BYTES", 2048)
    monkeypatch.setattr(layout, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(layout, "MIN_ROW_BYTES", 256)


@pytest.fixture
def arrays(rng) -> dict[str, Array]:
    return {name: Array(rng.standard_normal(shape, np.float32)) for name, shape in SHAPES.items()}


def write(directory: Path, arrays: dict[str, Array], num_at_once: int = 2) -> None:
    write_step(directory, 0, "params", arrays, {"from": "tests"}, dtype="float32", num_at_once=num_at_once)


@pytest.mark.parametrize(("num_at_once", "order"), [(1, "C"), (4, "C"), (2, "F")])
def test_what_is_written_in_slices_is_restored_on_any_mesh(tmp_path, arrays, mesh, small_chunks, num_at_once, order):
    for array in arrays.values():
        array.order = order
    write(tmp_path, arrays, num_at_once)
    assert verify(tmp_path, 0).problems == ()
    for spec in (PartitionSpec(), PartitionSpec(None, "tensor")):
        target = {
            name: jax.ShapeDtypeStruct(
                array.shape,
                np.float32,
                sharding=NamedSharding(mesh, spec if array.shape[1:] == (40, 50) else PartitionSpec()),
            )
            for name, array in arrays.items()
        }
        found = restore(tmp_path, target, part="params")
        assert found is not None
        assert found.metadata == {"from": "tests"}
        for name, array in arrays.items():
            assert np.asarray(found.state[name]).tobytes() == array.values.tobytes(), name
    with pytest.raises(InputError, match="1 arrays of this checkpoint are not those"):
        restore(tmp_path, target | {"norm/scale": target["embed/table"]}, part="params")


@pytest.mark.parametrize("order", ["C", "F"])
def test_layers_are_stored_and_read_in_the_order_that_they_came_in(tmp_path, rng, small_chunks, order):
    values = rng.standard_normal((3, 20, 30), np.float32)
    write(tmp_path, {"segments/0/up/kernel": Array(values, order)})
    with open_step(tmp_path) as step:
        layer = step.read_stored("segments/0/up/kernel", (1,))
        assert np.array_equal(layer, values[1])
        assert layer.flags.f_contiguous == (order == "F")
        assert np.array_equal(step.read("segments/0/up/kernel", (slice(0, 2), slice(3, 5))), values[:2, 3:5])


def test_no_slice_is_larger_than_a_chunk_may_be(tmp_path, arrays, small_chunks):
    write(tmp_path, arrays)
    for array in arrays.values():
        read = [array.values[index] for index in array.reads]
        assert max(part.nbytes for part in read) <= 4096
        assert sum(part.size for part in read) == array.values.size
    assert len(arrays["segments/0/up/kernel"].reads) == 6
    assert len(arrays["norm/scale"].reads) == 1


def test_fewer_bits_are_stored_and_come_back_as_float32(tmp_path, rng, mesh):
    values = rng.standard_normal((6, 8)).astype(BFLOAT16)
    write(tmp_path, {"table": Array(values)})
    struct = jax.ShapeDtypeStruct((6, 8), np.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    found = restore(tmp_path, {"table": struct}, part="params")
    assert found is not None
    assert found.state["table"].dtype == np.float32
    assert np.array_equal(np.asarray(found.state["table"]), values.astype(np.float32))
    with open_step(tmp_path) as step:
        assert step.leaves["table"].dtype == "float32"
        assert step.read_stored("table").dtype == BFLOAT16
        assert step.read("table").dtype == np.float32
        assert np.array_equal(step.read("table", (2, slice(1, 3))), values[2, 1:3].astype(np.float32))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("shape", "chunk", "written"),
    [
        ((32, 4096, 14336), (1, 256, 14336), 256 * 14336 * 4),  # a layer that is too large for one chunk
        ((30, 576, 1536), (1, 576, 1536), 4 * 576 * 1536 * 4),  # a layer a chunk, several in one go
        ((128256, 4096), (1002, 4096), 1002 * 4096 * 4),  # 128 equal parts
        ((50257, 4096), (1006, 4096), 1006 * 4096 * 4),  # no equal parts of this number of rows: 29 * 1733
        ((80, 8192), (80, 8192), 80 * 8192 * 4),
        ((), (), 4),
    ],
    ids=str,
)
def test_chunks_are_of_whole_layers_or_rows(shape, chunk, written):
    found = chunk_shape(shape, 4)
    assert 4 * math.prod(found) <= layout.CHUNK_BYTES
    assert slice_bytes(shape, 4) <= layout.CHUNK_BYTES
    if found:
        assert found[-1] == shape[-1]
    assert found == chunk
    assert slice_bytes(shape, 4) == written


def test_an_array_that_cannot_be_read_leaves_no_step(tmp_path, arrays, small_chunks):
    class Broken(Array):
        def read_stored(self, index: Any = ()) -> np.ndarray:
            raise OSError(5, "Input/output error")

    arrays["segments/0/up/kernel"] = Broken(arrays["segments/0/up/kernel"].values)
    with pytest.raises(InputError, match="cannot be written: .*Input/output error"):
        write(tmp_path, arrays)
    assert list_steps(tmp_path) == []
    with pytest.raises(InputError, match="no checkpoint"), open_step(tmp_path):
        pass


def test_a_damaged_step_is_not_opened(tmp_path, arrays):
    write(tmp_path, arrays)
    file = max((tmp_path / "0" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="damaged: its SHA-256 does not match"), open_step(tmp_path):
        pass


def test_a_state_that_was_saved_is_read_in_slices(saved, mesh, make_state):
    """Saved as training saves it, whatever the node types and shardings."""
    state = make_state(mesh, 2)
    with open_step(saved) as step:
        assert step.step == 2
        assert set(step.leaves) == set(state["params"])
        for name, array in state["params"].items():
            expected = np.asarray(array)
            assert np.array_equal(step.read(name), expected)
            assert np.array_equal(step.read(name, (slice(1, 3),)), expected[1:3])
    with open_step(saved, step=1) as older:
        assert not np.array_equal(older.read("norm"), np.asarray(state["params"]["norm"]))


@pytest.mark.parametrize("spec", [(), (None, "tensor"), (None, None, ("data", "fsdp"))], ids=str)
def test_training_saves_in_chunks_that_are_small_enough(tmp_path, mesh, rng, small_chunks, spec):
    """Layer by layer, so that an export reads no more than it needs; on any sharding."""
    values = {"stack": rng.standard_normal((3, 32, 40), np.float32), "table": rng.standard_normal((256, 8), np.float32)}
    shardings = {"stack": PartitionSpec(*spec), "table": PartitionSpec("tensor")}
    state = {
        "params": {name: jax.device_put(array, NamedSharding(mesh, shardings[name])) for name, array in values.items()}
    }
    saver = Saver(str(tmp_path), CheckpointConfig())
    saver.save(1, state, {})
    saver.close()
    with open_step(tmp_path) as step:
        assert step.chunk("stack")[0] == 1
        assert step.chunk("table")[0] > 1
        for name, array in values.items():
            assert 4 * math.prod(step.chunk(name)) <= 4096
            assert np.array_equal(step.read(name), array)
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
    found = restore(tmp_path, target)
    assert found is not None
    for name, array in values.items():
        assert np.array_equal(np.asarray(found.state["params"][name]), array)


def test_chunks_of_another_size_are_read_too(tmp_path, arrays, monkeypatch):
    """Steps that were saved before chunks were bounded have an array in one."""
    with monkeypatch.context() as patch:
        patch.setattr(slices, "chunk_shape", lambda shape, itemsize: shape)
        write(tmp_path, arrays)
    with open_step(tmp_path) as step:
        assert step.chunk("segments/0/up/kernel") == (3, 40, 50)
        assert np.array_equal(step.read("segments/0/up/kernel", (1,)), arrays["segments/0/up/kernel"].values[1])
