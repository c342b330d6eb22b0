import jax
import pytest
from jax.sharding import AxisType

from lmjax.errors import InputError
from lmjax.mesh import AXES, MeshConfig, axis_sizes, batch_shards, make_mesh, single_device_mesh, start_distributed

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("sizes", "num_devices", "expected"),
    [
        ({}, 8, (1, 8, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, 8, (2, 2, 2)),
        ({"fsdp": 16, "tensor": -1}, 64, (1, 16, 4)),
        ({"data": 2, "fsdp": 3, "tensor": 1}, 6, (2, 3, 1)),
        ({"fsdp": -1}, 1, (1, 1, 1)),
    ],
)
def test_the_open_axis_takes_what_the_others_leave(sizes, num_devices, expected):
    found = axis_sizes(MeshConfig(**sizes), num_devices)
    assert tuple(found.items()) == tuple(zip(AXES, expected, strict=True))


@pytest.mark.parametrize(
    ("sizes", "num_devices", "message"),
    [
        ({"data": 3}, 8, "data 3 x tensor 1 = 3 does not divide the 8 devices"),
        ({"data": 2, "fsdp": 2, "tensor": 4}, 8, "data 2 x fsdp 2 x tensor 4 = 16 devices, but 8 are here"),
        ({"fsdp": 4}, 8, "data 1 x fsdp 4 x tensor 1 = 4 devices, but 8 are here"),
        ({"data": 16}, 8, "= 16 does not divide the 8 devices"),
    ],
)
def test_meshes_that_do_not_fit_are_refused_with_the_arithmetic(sizes, num_devices, message):
    with pytest.raises(InputError, match=message):
        axis_sizes(MeshConfig(**sizes), num_devices)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 0}, "mesh.data is 0"),
        ({"tensor": -2}, "mesh.tensor is -2"),
        ({"data": -1, "fsdp": -1}, "only one axis"),
        ({"fsdp": True}, "valid integer"),
        ({"expert": 2}, "expert"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        MeshConfig(**sizes)


def test_axes_are_explicit_and_every_device_is_used_once():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert mesh.axis_names == AXES
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert {device.id for device in mesh.devices.flat} == {device.id for device in jax.devices()}
    assert batch_shards(mesh.shape) == 4
    one = single_device_mesh()
    assert (one.axis_names, one.axis_types, one.size) == (mesh.axis_names, mesh.axis_types, 1)


def test_one_process_starts_nothing(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    start_distributed()
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize("name", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_a_coordinator_needs_numbers_of_processes(name, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    monkeypatch.setenv(name, "two")
    with pytest.raises(InputError, match=f"{name} is 'two'"):
        start_distributed()
