"""The tiny decoder, random parameters and packed batches that the tests of the model and the step share."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from lmjax.mesh import MeshConfig, make_mesh
from lmjax.models.decoder import DecoderConfig, Execution
from lmjax.ops.cross_entropy import LossOptions
from lmjax.optim import OptimizerConfig
from lmjax.sharding import batch_sharding
from lmjax.train.state import Blueprint, TrainState, make_blueprint
from lmjax.train.step import DeviceBatch, StepMetrics, make_step

MESHES = [
    (2, 2, 2),
    *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in ((8, 1, 1), (1, 8, 1), (1, 1, 8))),
]
"""Sizes of data, fsdp and tensor on eight devices: all three at once in the quick tier, each alone in the slow one."""

CONFIG = DecoderConfig(
    vocab_size=90, max_length=16, embed_dim=32, num_layers=2, num_heads=8, head_dim=4, mlp_dim=48, rope_theta=100.0
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=3, epsilon=1e-6)
FLOAT32 = Execution(compute_dtype=jnp.dtype("float32"))
LOSS = LossOptions(chunk_tokens=24)
ROWS, LENGTH = 8, 16


def with_changes(config: DecoderConfig, **changes: Any) -> DecoderConfig:
    return dataclasses.replace(config, **changes)


def mesh_of(data: int, fsdp: int, tensor: int, expert: int = 1) -> Mesh:
    """A mesh of as many of the eight devices as it needs."""
    config = MeshConfig(data=data, fsdp=fsdp, expert=expert, tensor=tensor)
    return make_mesh(config, jax.devices()[: data * fsdp * expert * tensor])


def blueprint_of(config: DecoderConfig, mesh: Mesh, optimizer: OptimizerConfig = OPTIMIZER) -> Blueprint:
    return make_blueprint(config, optimizer, 20, mesh)


def random_params(blueprint: Blueprint, rng: np.random.Generator) -> Any:
    """Parameters with every norm randomised too, as numpy arrays: the same on every mesh, and nothing to compile."""

    def draw(path, leaf):
        normal = rng.standard_normal(leaf.shape).astype(np.float32)
        is_scale = path[-1].key == "scale"
        return 1 + 0.3 * normal if is_scale else 0.2 * normal

    return jax.tree_util.tree_map_with_path(draw, blueprint.state.params)


def state_of(blueprint: Blueprint, params: Any) -> TrainState:
    """The state before the first update, with these parameters."""
    placed = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, blueprint.state.params)
    zeros = jax.tree.map(
        lambda like: jax.device_put(np.zeros(like.shape, like.dtype), like.sharding),
        (blueprint.state.step, blueprint.state.opt_state),
    )
    return TrainState(zeros[0], placed, zeros[1])


def packed_batch(rng: np.random.Generator, config: DecoderConfig) -> DeviceBatch:
    """(ROWS, LENGTH) numpy arrays: two documents a row and padding, so that rows have unequal numbers of targets."""
    tokens = rng.integers(0, config.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    segment_ids = np.zeros((ROWS, LENGTH), np.int32)
    positions = np.zeros((ROWS, LENGTH), np.int32)
    weights = np.zeros((ROWS, LENGTH), np.float32)
    for row in range(ROWS):
        first = int(rng.integers(2, LENGTH // 2))
        second = int(rng.integers(2, LENGTH - first + 1))
        for number, (start, size) in enumerate([(0, first), (first, second)], 1):
            segment_ids[row, start : start + size] = number
            positions[row, start : start + size] = np.arange(size)
            weights[row, start : start + size - 1] = 1
    targets = np.where(weights > 0, tokens[:, 1:], 0)
    return DeviceBatch(np.where(segment_ids > 0, tokens[:, :-1], 0), targets, segment_ids, positions, weights)


def to_mesh(batch: DeviceBatch, mesh: Mesh, accumulation: int = 1) -> DeviceBatch:
    """(ROWS, LENGTH) arrays on the devices; micro-batch a has the rows r with r mod accumulation = a."""

    def place(field):
        field = field.reshape(-1, accumulation, field.shape[-1]).swapaxes(0, 1)
        return jax.device_put(field, batch_sharding(mesh, num_leading=1))

    return DeviceBatch(*(place(field) for field in batch))


def by_rows(mesh: Mesh, *arrays: np.ndarray) -> list[jax.Array]:
    """(rows, ...) arrays on the devices, without a dimension of micro-batches."""
    return [jax.device_put(array, batch_sharding(mesh)) for array in arrays]


def jitted_step(blueprint: Blueprint, execution: Execution = FLOAT32, loss: LossOptions = LOSS):
    return jax.jit(make_step(blueprint, execution, loss), donate_argnums=0)


class Trainer:
    """The compiled step of a tiny decoder, run from random parameters."""

    def __init__(self, config: DecoderConfig, mesh: Mesh, execution: Execution = FLOAT32, accumulation: int = 1):
        self.blueprint = blueprint_of(config, mesh)
        self.step = jitted_step(self.blueprint, execution)
        self.accumulation = accumulation

    def train(self, batches: Sequence[DeviceBatch], seed: int) -> tuple[TrainState, list[StepMetrics]]:
        """The state and the metrics after one update a batch."""
        blueprint = self.blueprint
        state = state_of(blueprint, random_params(blueprint, np.random.default_rng(seed)))
        metrics = []
        with jax.set_mesh(blueprint.mesh):
            for batch in batches:
                state, told = self.step(state, to_mesh(batch, blueprint.mesh, self.accumulation))
                metrics.append(jax.tree.map(lambda value: np.asarray(value) if value.ndim else float(value), told))
        return state, metrics


def execution(**changes: Any) -> Execution:
    return dataclasses.replace(FLOAT32, **changes)


def assert_trees_close(found: Any, expected: Any, tolerance: float) -> None:
    """The difference of every leaf from its counterpart has at most ``tolerance`` times the counterpart's norm."""
    pairs = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, one), other in pairs:
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        difference, size = np.linalg.norm(one - other), np.linalg.norm(other)
        assert difference <= tolerance * size, f"{jax.tree_util.keystr(path)}: {difference} of {size}"


def generator(request: pytest.FixtureRequest) -> np.random.Generator:
    """The random inputs of a fixture that several tests share."""
    return np.random.default_rng(request.config.getoption("--seed"))


def with_parameter(module: nnx.Module, name: str, value: np.ndarray) -> nnx.Module:
    """``module`` with its parameter ``name`` set to ``value``."""
    getattr(module, name)[...] = jnp.asarray(value)
    return module
