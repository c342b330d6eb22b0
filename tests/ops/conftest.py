"""The meshes on which every operation has to give one device's numbers."""

import math

import jax
import pytest
from jax.sharding import Mesh

from lmjax.mesh import MeshConfig, make_mesh


def mesh_of(data: int, fsdp: int, tensor: int) -> Mesh:
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    return make_mesh(config, jax.devices()[: math.prod((data, fsdp, tensor))])


@pytest.fixture(
    params=[(1, 1, 1), (8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=lambda shape: "x".join(map(str, shape))
)
def mesh(request: pytest.FixtureRequest) -> Mesh:
    return mesh_of(*request.param)


@pytest.fixture
def mesh_2x2x2() -> Mesh:
    return mesh_of(2, 2, 2)


@pytest.fixture
def one_device() -> Mesh:
    return mesh_of(1, 1, 1)
