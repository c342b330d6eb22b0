"""Names of topologies: what they stand for, what is refused and how, and that the compilers know the same."""

import importlib.util
import math
import re

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from lmjax.errors import InputError
from lmjax.hardware import DEVICES, hardware
from lmjax.mesh import MeshConfig
from lmjax.plan.compile import topology_mesh
from lmjax.plan.topology import EXAMPLES, MACHINES, parse_topology, topology_devices

pytestmark = pytest.mark.fast

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
needs_cuda = pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason="needs JAX for CUDA")


@pytest.mark.parametrize(
    ("name", "slices", "devices", "hardware"),
    [
        ("v4:2x2x1", 1, 4, "tpu v4"),
        ("v5e:1x1", 1, 1, "tpu v5e"),
        ("v5e:16x16", 1, 256, "tpu v5e"),
        ("v5p:4x4x4", 1, 64, "tpu v5p"),
        ("2xv5p:8x8x8", 2, 1024, "tpu v5p"),
        ("tpu7x:4x4x4", 1, 128, "tpu 7x"),
        ("h200:8", 1, 8, "gpu hopper"),
        ("16xh200:8", 16, 128, "gpu hopper"),
        ("a100:4", 1, 4, "gpu ampere"),
        ("cpu:8", 1, 8, "cpu"),
    ],
)
def test_a_name_says_how_many_devices_of_what(name, slices, devices, hardware):
    topology = parse_topology(name)
    assert (topology.slices, topology.num_devices, str(topology.hardware)) == (slices, devices, hardware)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5p:banana", "v5p:4x4x4"),
        ("v9:2x2", "near it are v"),
        ("h20:8", "near it are h200:8"),
        ("v5p", "such as"),
        ("", "such as"),
        ("v5p:3x3x3", "Near it are v5p:2x2x2, v5p:2x2x4, v5p:2x4x4, v5p:4x4x4"),
        ("v5e:5x5", "v5e does not come in 5x5. Near it are v5e:2x4, v5e:4x4, v5e:4x8, v5e:8x8; several slices"),
        ("v5e:2x2x2", "does not come in 2x2x2"),
        ("0xv5p:4x4x4", "not known"),
        ("h200:" + 5000 * "9", "not known"),
        ("v5p:1x1x1", "v5p does not come in 1x1x1"),
        ("v5p-64", "counts TensorCores, of which a chip has two; here it is v5p:2x4x4, by"),
        ("v5p-1024", "here it is v5p:8x8x8 or v5p:4x8x16 or"),
        ("v5litepod-256", "counts chips; here it is v5e:16x16, by"),
        ("v6e-8", "here it is v6e:2x4, by"),
        ("v4-9", "does not come in so many. Near it are v4:2x2x1, v4:2x2x2"),
        ("v5e-12", "counts chips; v5e does not come in so many. Near it are v5e:2x2, v5e:2x4"),
        ("v5e-1234567", "not known"),
        ("h200:3", "Near it are h200:1, h200:2, h200:4, h200:8; several hosts are HOSTSxh200:GPUS"),
        ("h200:2x8", "several hosts are HOSTSxh200:GPUS"),
        ("2xcpu:8", "a name is cpu:DEVICES"),
        ("cpu:1000", "up to cpu:64"),
    ],
)
def test_what_there_is_not_is_refused_with_what_is_near(name, said):
    with pytest.raises(InputError) as caught:
        parse_topology(name)
    assert said in str(caught.value)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_are_names(name):
    assert parse_topology(name).num_devices >= 8


def test_machines_are_devices_that_are_known():
    for machine in MACHINES.values():
        assert machine.device_kind in DEVICES
        assert machine.shapes == tuple(sorted(machine.shapes, key=math.prod))
        assert machine.link_bandwidth > machine.network_bandwidth


@needs_libtpu
@pytest.mark.parametrize(
    "name", ["v4:4x4x4", "v5e:1x1", "v5e:2x4", "v5p:4x4x4", "2xv5p:2x2x2", "v6e:1x1", "v6e:8x16", "tpu7x:2x4x4"]
)
def test_libtpu_has_the_same_devices(name):
    topology, devices = parse_topology(name), topology_devices(name)
    assert len(devices) == topology.num_devices
    assert len({getattr(device, "slice_index", 0) for device in devices}) == topology.slices
    assert {str(hardware(device)) for device in devices} == {str(topology.hardware)}


@needs_libtpu
def test_a_mesh_has_the_devices_of_its_topology():
    mesh = topology_mesh(MeshConfig(fsdp=-1, tensor=4), "v5p:4x4x4")
    assert dict(mesh.shape) == {"data": 1, "fsdp": 16, "expert": 1, "tensor": 4}
    mesh = topology_mesh(MeshConfig(data=2, dcn_data=2, fsdp=-1), "2xv5p:2x2x2")
    assert dict(mesh.shape) == {"data": 2, "fsdp": 8, "expert": 1, "tensor": 1}
    assert {device.slice_index for device in mesh.devices[0].flat} == {mesh.devices[0].flat[0].slice_index}


@needs_cuda
@pytest.mark.parametrize("name", ["h200:8", "2xh100:8", "a100:4", "b200:8"])
def test_the_gpu_compiler_has_the_same_devices(name):
    devices = topology_devices(name)
    assert len(devices) == parse_topology(name).num_devices
    assert {str(hardware(device)) for device in devices} == {str(parse_topology(name).hardware)}


def test_forced_devices_of_the_cpu_are_those_that_are_there():
    assert [device.platform for device in topology_devices("cpu:8")] == ["cpu"] * 8
    with pytest.raises(InputError, match="this process has 8 CPU devices already"):
        topology_devices("cpu:16")


def test_without_a_compiler_its_extra_is_named(monkeypatch):
    def missing(**_):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(InputError, match=r"pip install 'lmjax\[tpu\]'"):
        topology_devices.__wrapped__("v5p:2x2x2")
    monkeypatch.setitem(__import__("sys").modules, "jax_plugins.xla_cuda13", None)
    with pytest.raises(InputError, match=r"pip install 'lmjax\[cuda13\]'"):
        topology_devices.__wrapped__("h200:8")


@needs_libtpu
@pytest.mark.parametrize(
    "generation", [name for name, machine in MACHINES.items() if machine.hardware.platform == "tpu"]
)
def test_memory_is_what_the_compiler_gives_a_program(generation):
    machine = MACHINES[generation]
    shape = "x".join(map(str, (*machine.shapes[0][1:], machine.shapes[0][0])))
    sharding = SingleDeviceSharding(topology_devices(f"{generation}:{shape}")[0])
    rows = jax.ShapeDtypeStruct((machine.memory // 2048, 1024), "bfloat16", sharding=sharding)
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.jit(lambda x: x + 1).trace(rows).lower(lowering_platforms=("tpu",)).compile()
    found = re.search(r"available HBM \((\d+\.\d+)G\)", str(caught.value))
    assert found is not None
    assert 0 <= float(found[1]) * 2**30 - machine.memory < 2**25  # versions differ by 10 MiB
