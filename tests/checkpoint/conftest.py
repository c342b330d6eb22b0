"""A small train state with optax's node types, on any mesh, and a directory that holds it at two steps."""

import typing
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lmjax.checkpoint.save import CheckpointConfig, Saver

AXES = ("data", "fsdp", "tensor")
SPECS = {"table": PartitionSpec("tensor", "fsdp"), "mlp": PartitionSpec(("data", "fsdp"), "tensor")}

MakeState = typing.Callable[..., dict[str, typing.Any]]


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    devices = np.array(jax.devices()[: data * fsdp * tensor]).reshape(data, fsdp, tensor)
    return Mesh(devices, AXES, axis_types=(AxisType.Explicit,) * 3)


def sharding_of(path: tuple[typing.Any, ...], mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, SPECS.get(str(getattr(path[-1], "key", "")), PartitionSpec()))


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    return make_mesh(2, 2, 2)


@pytest.fixture(scope="session")
def mesh_of() -> Callable[[int, int, int], Mesh]:
    return make_mesh


@pytest.fixture(scope="session")
def make_state() -> MakeState:
    """``make_state(mesh, number, dim=16)``: state number ``number``; no two numbers have a value in common."""

    def make(mesh: Mesh, number: int, dim: int = 16) -> dict[str, typing.Any]:
        values = np.random.default_rng(number)
        parameters = {
            "table": values.standard_normal((8, dim), np.float32),
            "mlp": values.standard_normal((dim, 8)).astype("bfloat16"),
            "norm": values.standard_normal(dim, np.float32),
        }
        moments = jax.tree.map(lambda leaf: (leaf * number).astype(leaf.dtype), parameters)
        adam = optax.ScaleByAdamState(count=np.array(number, np.int32), mu=moments, nu=parameters)
        state = {
            "params": parameters,
            "optimizer": (adam, optax.EmptyState(), optax.ScaleByScheduleState(np.array(number, np.int32))),
            "step": np.array(number, np.int32),
        }
        return jax.tree_util.tree_map_with_path(lambda path, leaf: jax.device_put(leaf, sharding_of(path, mesh)), state)

    return make


@pytest.fixture(scope="session")
def make_target() -> Callable[[typing.Any, Mesh], typing.Any]:
    """The abstract tree of a state on another mesh."""

    def make(state: typing.Any, mesh: Mesh) -> typing.Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(path, mesh)), state
        )

    return make


@pytest.fixture(scope="session")
def same_bits() -> Callable[[typing.Any, typing.Any], bool]:
    def compare(left: typing.Any, right: typing.Any) -> bool:
        assert jax.tree.structure(left) == jax.tree.structure(right)
        pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
        return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)

    return compare


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, mesh: Mesh, make_state: MakeState) -> Path:
    """A directory with the states of steps 1 and 2. A test that changes a file puts it back."""
    directory = tmp_path_factory.mktemp("checkpoints")
    saver = Saver(str(directory), CheckpointConfig(keep_last=2))
    for step in (1, 2):
        saver.save(step, make_state(mesh, step), {"fingerprint": "f", "step_was": step})
    saver.close()
    return directory
