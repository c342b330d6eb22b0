"""Meshes that follow the links of a slice, without its compiler and with it."""

import itertools

import pytest

from lmjax.errors import InputError
from lmjax.mesh import MeshConfig, make_mesh
from lmjax.plan.layout import check_layout
from lmjax.plan.topology import parse_topology, topology_devices

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("name", ["v5p:2x4x4", "v5p:2x2x1", "v4:2x2x4", "v5e:4x8", "v6e:2x4", "tpu7x:2x2x2"])
def test_a_mesh_is_refused_without_a_compiler_where_it_would_be_with_one(name: str):
    pytest.importorskip("libtpu")
    topology, outcomes = parse_topology(name), []
    devices = topology_devices(name)
    for tensor, data in itertools.product((1, 2, 4, 8, 16), (1, 2, 3, 4)):
        fsdp, rest = divmod(topology.num_devices, tensor * data)
        if rest:
            continue
        sizes = {"data": data, "fsdp": fsdp, "expert": 1, "tensor": tensor}
        outcomes.append(is_laid_out(check_layout, topology, tuple(sizes.items())))
        assert outcomes[-1] == is_laid_out(make_mesh, MeshConfig(**sizes), devices), sizes
    assert any(outcomes)


def is_laid_out(function, *arguments) -> bool:
    try:
        function(*arguments)
    except InputError:
        return False
    return True


def test_a_mesh_that_cuts_across_the_links_is_refused():
    mesh = (("data", 1), ("fsdp", 128), ("expert", 1), ("tensor", 2))
    with pytest.raises(InputError, match=r"cannot be laid out on these 256 devices \(TPU v5p\)"):
        check_layout(parse_topology("v5p:4x8x8"), mesh)
    check_layout(parse_topology("v5e:16x16"), mesh)
