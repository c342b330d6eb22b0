import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from lmjax.errors import InputError
from lmjax.hardware import Hardware
from lmjax.mesh import AXES, MeshConfig, axis_sizes, batch_shards, make_mesh, single_device_mesh
from lmjax.models.decoder import DecoderConfig, Execution
from lmjax.ops.cross_entropy import LossOptions
from lmjax.optim import OptimizerConfig
from lmjax.plan.compile import compile_step
from lmjax.train.feed import abstract_batch
from lmjax.train.state import make_blueprint


@pytest.mark.fast
@pytest.mark.parametrize(
    ("sizes", "num_devices", "expected"),
    [
        ({}, 8, (1, 8, 1, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, 8, (2, 2, 1, 2)),
        ({"fsdp": 16, "tensor": -1}, 64, (1, 16, 1, 4)),
        ({"data": 2, "fsdp": 3, "tensor": 1}, 6, (2, 3, 1, 1)),
        ({"expert": -1, "fsdp": 2}, 8, (1, 2, 4, 1)),
        ({"fsdp": -1}, 1, (1, 1, 1, 1)),
    ],
)
def test_the_open_axis_takes_what_the_others_leave(sizes, num_devices, expected):
    found = axis_sizes(MeshConfig(**sizes), num_devices)
    assert tuple(found.items()) == tuple(zip(AXES, expected, strict=True))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("sizes", "num_devices", "message"),
    [
        ({"data": 3}, 8, "data 3 x expert 1 x tensor 1 = 3 does not divide the 8 devices"),
        ({"data": 2, "fsdp": 2, "tensor": 4}, 8, "data 2 x fsdp 2 x expert 1 x tensor 4 = 16 devices, but 8 are here"),
        ({"fsdp": 4}, 8, "data 1 x fsdp 4 x expert 1 x tensor 1 = 4 devices, but 8 are here"),
        ({"data": 16}, 8, "= 16 does not divide the 8 devices"),
    ],
)
def test_meshes_that_do_not_fit_are_refused_with_the_arithmetic(sizes, num_devices, message):
    with pytest.raises(InputError, match=message):
        axis_sizes(MeshConfig(**sizes), num_devices)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 0}, "mesh.data is 0"),
        ({"tensor": -2}, "mesh.tensor is -2"),
        ({"data": -1, "fsdp": -1}, "only one axis"),
        ({"fsdp": True}, "valid integer"),
        ({"expert": 0}, "mesh.expert is 0"),
        ({"context": 2}, "context"),
        ({"dcn_data": 0}, "mesh.dcn_data is 0"),
        ({"dcn_data": -1}, "mesh.dcn_data is -1"),
        ({"data": 3, "dcn_data": 2}, "mesh.dcn_data is 2, which does not divide mesh.data 3"),
        ({"fsdp": 4, "dcn_fsdp": 3}, "mesh.dcn_fsdp is 3, which does not divide mesh.fsdp 4"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        MeshConfig(**sizes)


@pytest.mark.fast
def test_axes_are_explicit_and_every_device_is_used_once():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert mesh.axis_names == AXES
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert {device.id for device in mesh.devices.flat} == {device.id for device in jax.devices()}
    assert batch_shards(mesh.shape) == 4
    one = single_device_mesh()
    assert (one.axis_names, one.axis_types, one.size) == (mesh.axis_names, mesh.axis_types, 1)


@dataclasses.dataclass(frozen=True)
class Device:
    """What a mesh looks at in a device that is not here."""

    id: int
    platform: str
    device_kind: str
    process_index: int
    slice_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def tpus(num_slices: int) -> list[Device]:
    """Slices of 2 x 2 x 2 v5p chips, the last one first."""
    found = []
    for slice_index in reversed(range(num_slices)):
        for number, coords in enumerate(itertools.product(range(2), repeat=3)):
            process = 2 * slice_index + number // 4
            found.append(Device(8 * slice_index + number, "tpu", "TPU v5", process, slice_index, coords))
    return found


def gpus(num_hosts: int, per_host: int, processes_per_host: int = 1) -> list[Device]:
    """Hosts that each have a slice index of their own, as JAX numbers them by boot."""
    share = per_host // processes_per_host
    return [
        Device(number, "gpu", "NVIDIA H100", number // share, number // per_host)
        for number in range(num_hosts * per_host)
    ]


def slices(mesh: jax.sharding.Mesh) -> np.ndarray:
    return np.vectorize(lambda device: device.slice_index)(mesh.devices)


@pytest.mark.fast
def test_only_data_crosses_slices():
    mesh = make_mesh(MeshConfig(data=4, fsdp=4, tensor=2, dcn_data=4), tpus(4))
    assert mesh.devices.shape == (4, 4, 1, 2)
    assert {device.id for device in mesh.devices.flat} == set(range(32))
    for number in range(4):
        assert (slices(mesh)[number] == number).all()


@pytest.mark.fast
def test_what_is_left_of_data_lies_inside_a_slice():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2, dcn_data=2), tpus(2))
    assert mesh.devices.shape == (4, 2, 1, 2)
    assert slices(mesh)[:, 0, 0, 0].tolist() == [0, 0, 1, 1]
    for number in range(4):
        assert len(set(slices(mesh)[number].flat)) == 1


@pytest.mark.fast
def test_fsdp_crosses_slices_where_that_is_asked_for():
    mesh = make_mesh(MeshConfig(data=2, fsdp=8, tensor=2, dcn_data=2, dcn_fsdp=2), tpus(4))
    assert slices(mesh)[:, ::4, 0, 0].tolist() == [[0, 1], [2, 3]]
    assert (slices(mesh)[:, ::4] == slices(mesh)[:, 3::4]).all()
    assert (slices(mesh)[..., 0] == slices(mesh)[..., 1]).all()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("sizes", "num_slices", "message"),
    [
        ({"fsdp": -1}, 2, r"dcn_data 1 x dcn_fsdp 1 = 1, but the 16 devices here form 2 slices. Set mesh.dcn_data=2"),
        ({"data": 2, "dcn_data": 2}, 1, r"dcn_data 2 x dcn_fsdp 1 = 2, but the 8 devices here form 1 slice\."),
        ({"data": 2, "dcn_data": 2}, 4, r"= 2, but the 32 devices here form 4 slices"),
        ({"data": 4, "dcn_data": 2, "dcn_fsdp": 2}, 2, r"dcn_data 2 x dcn_fsdp 2 = 4, but the 16 devices"),
        ({"data": -1, "fsdp": 16, "dcn_data": 2}, 2, r"leave data 1, .* dcn_data 2 parts: 1 mod 2 = 1"),
    ],
)
def test_a_number_of_slices_that_does_not_match_is_refused_with_the_arithmetic(sizes, num_slices, message):
    with pytest.raises(InputError, match=message):
        make_mesh(MeshConfig(**sizes), tpus(num_slices))


@pytest.mark.fast
def test_slices_of_unequal_size_are_refused():
    with pytest.raises(InputError, match=r"unequal size .*\{0: 8, 1: 4\}"):
        make_mesh(MeshConfig(data=2, dcn_data=2), [device for device in tpus(2) if device.id < 12])


@pytest.mark.fast
def test_an_axis_may_go_over_all_gpus_of_several_hosts():
    mesh = make_mesh(MeshConfig(fsdp=8), gpus(2, 4))
    assert [device.id for device in mesh.devices.flat] == list(range(8))


@pytest.mark.fast
@pytest.mark.parametrize("processes_per_host", [1, 4])
def test_hosts_with_gpus_are_what_dcn_crosses(processes_per_host):
    devices = gpus(2, 4, processes_per_host)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, dcn_data=2), devices[4:] + devices[:4])
    assert slices(mesh)[:, 0, 0, 0].tolist() == [0, 1]
    for number in range(2):
        assert (slices(mesh)[number] == number).all()
    with pytest.raises(InputError, match=f"the 8 devices here form {2 * processes_per_host} hosts"):
        make_mesh(MeshConfig(data=-1, fsdp=1, dcn_data=8 if processes_per_host == 1 else 4), devices)


@pytest.mark.fast
def test_without_a_slice_index_the_process_stands_for_the_host():
    devices = [dataclasses.replace(device, slice_index=0) for device in gpus(2, 4)]
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, dcn_data=2), devices)
    assert [{device.process_index for device in row.flat} for row in mesh.devices] == [{0}, {1}]


@pytest.mark.fast
def test_slices_of_absent_tpus_make_a_mesh():
    pytest.importorskip("libtpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2", num_slices=2).devices
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, tensor=2, dcn_data=2), devices)
    assert mesh.devices.shape == (2, 4, 1, 2)
    assert [set(row.flat) for row in slices(mesh)] == [{0}, {1}]


@pytest.mark.slow
def test_a_step_for_two_slices_compiles_and_gathers_inside_a_slice_only():
    pytest.importorskip("libtpu")
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1", num_slices=2).devices
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, dcn_data=2), devices)
    model = DecoderConfig(
        vocab_size=512, max_length=256, embed_dim=256, num_layers=2, num_heads=2, head_dim=128, mlp_dim=512
    )
    blueprint = make_blueprint(model, OptimizerConfig(), 10, mesh)
    execution = Execution(compute_dtype=jnp.dtype("bfloat16"), hardware=Hardware("tpu", "v5p"))
    step = compile_step(blueprint, execution, LossOptions(chunk_tokens=256), abstract_batch(8, 256, 1, mesh))
    assert step.collectives["all-gather"].count > 0
    assert set(re.findall(r"replica_groups=(\S+),", step.text)) == {"{{0,1,2,3}}"}
    assert "MegascaleRendezvousKeyName" in step.text
