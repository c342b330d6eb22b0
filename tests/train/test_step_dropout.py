"""Dropout in the step: drawn from the run's seed, the update and the row, and from nothing else."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.train.step import DeviceBatch, loss_sums, make_step, row_keys
from tests import tiny
from tests.tiny import CONFIG, FLOAT32, LOSS

DROPOUT = tiny.with_changes(CONFIG, dropout=0.3)


@pytest.fixture(scope="module")
def batches(request):
    rng = tiny.generator(request)
    return [tiny.packed_batch(rng, CONFIG) for _ in range(2)]


@pytest.fixture(scope="module")
def one_device():
    return tiny.Trainer(DROPOUT, tiny.mesh_of(1, 1, 1))


def assert_same_updates(trainer: tiny.Trainer, other: tiny.Trainer, batches, seed: int) -> None:
    (state, told), (other_state, other_told) = (each.train(batches, seed) for each in (trainer, other))
    for ours, theirs in zip(told, other_told, strict=True):
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5)
        np.testing.assert_allclose(ours.grad_norm, theirs.grad_norm, rtol=1e-4)
    tiny.assert_trees_close(state.params, other_state.params, 1e-3)


@pytest.mark.parametrize(
    ("sizes", "accumulation"),
    [((2, 1, 2), 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in (((2, 1, 1), 2), ((2, 2, 2), 1)))],
)
def test_neither_micro_batches_nor_the_mesh_change_what_is_zeroed(sizes, accumulation, batches, one_device, seed):
    trainer = tiny.Trainer(DROPOUT, tiny.mesh_of(*sizes), accumulation=accumulation)
    assert_same_updates(trainer, one_device, batches, seed)


def loss_of(step, blueprint, batch, seed: int, step_number: int = 0) -> float:
    """What an update tells that is number ``step_number``, from the same parameters."""
    state = tiny.state_of(blueprint, tiny.random_params(blueprint, np.random.default_rng(seed)))
    number = jax.device_put(np.int32(step_number), blueprint.state.step.sharding)
    with jax.set_mesh(blueprint.mesh):
        return float(step(state._replace(step=number), tiny.to_mesh(batch, blueprint.mesh))[1].loss)


def test_other_updates_and_rows_zero_something_else(batches, one_device, seed):
    blueprint, batch, step = one_device.blueprint, batches[0], one_device.step
    first = loss_of(step, blueprint, batch, seed)
    assert loss_of(step, blueprint, batch, seed) == first
    rolled = DeviceBatch(*(np.roll(field, 1, axis=0) for field in batch))  # the same rows at other places
    others = loss_of(step, blueprint, batch, seed, step_number=1), loss_of(step, blueprint, rolled, seed)
    for loss in others:
        assert abs(loss / first - 1) > 1e-4


@pytest.mark.slow
def test_another_seed_zeroes_something_else(batches, one_device, seed):
    blueprint = one_device.blueprint
    step = jax.jit(make_step(blueprint, FLOAT32, LOSS, seed=1))
    losses = [loss_of(each, blueprint, batches[0], seed) for each in (one_device.step, step)]
    assert abs(losses[1] / losses[0] - 1) > 1e-4


def test_without_keys_nothing_is_zeroed(batches, one_device, seed):
    """As in evaluation: the loss is that of the same decoder without dropout."""
    blueprint = one_device.blueprint
    plain = tiny.blueprint_of(CONFIG, blueprint.mesh)
    params = tiny.state_of(blueprint, tiny.random_params(blueprint, np.random.default_rng(seed))).params

    @jax.jit
    def losses(params, batch):
        every = (loss_sums(each.decoder(params), batch, FLOAT32, LOSS)[0] for each in (blueprint, plain))
        return [sums.loss / sums.weight for sums in every]

    with jax.set_mesh(blueprint.mesh):
        ours, expected = losses(params, DeviceBatch(*tiny.by_rows(blueprint.mesh, *batches[0])))
    assert float(ours) == float(expected)
    assert abs(loss_of(one_device.step, blueprint, batches[0], seed) / float(expected) - 1) > 1e-3


def zero_but(params: Any, *ones: tuple[str, ...]) -> Any:
    """Parameters that are 0, but 1 in scales and where a path ends so."""

    def value(path, leaf):
        names = tuple(str(getattr(entry, "key", "")) for entry in path)
        is_one = names[-1] == "scale" or any(names[-len(end) :] == end for end in ones)
        return np.full(leaf.shape, is_one, np.float32)

    return jax.tree_util.tree_map_with_path(value, params)


def test_embeddings_are_dropped_and_every_branch_of_every_layer_by_a_pattern_of_its_own():
    """Embeddings that are ones give zeros and one other number; two branches that add ones give 0, 1 and 2 of them."""
    config = tiny.with_changes(CONFIG, attention_out_bias=True, mlp_bias=True, dropout=0.5)
    blueprint = tiny.blueprint_of(config, tiny.mesh_of(1, 1, 1))
    shape = (tiny.ROWS, tiny.LENGTH)

    @jax.jit
    def hidden(params, keys):
        ones = jax.sharding.reshard(jnp.ones(shape, jnp.int32), jax.P(("data", "fsdp", "expert")))
        return blueprint.decoder(params).hidden(ones, ones, ones, FLOAT32, noise_keys_B=keys)

    def counts(*ones: tuple[str, ...]) -> np.ndarray:
        """How many of what was added is left, of each number: shares of 0, 1, 2 ..."""
        params = tiny.state_of(blueprint, zero_but(blueprint.state.params, *ones)).params
        with jax.set_mesh(blueprint.mesh):
            found = np.asarray(hidden(params, row_keys(jax.random.key(0), 1, tiny.ROWS)[0]))
        smallest = np.where(found > 0, found, np.inf).min(axis=-1, keepdims=True)
        times = np.round(found / smallest).astype(int)
        np.testing.assert_allclose(found, times * smallest, rtol=1e-5)
        return np.bincount(times.reshape(-1)) / times.size

    size = tiny.ROWS * tiny.LENGTH * config.embed_dim
    tolerance = 4 * (0.25 / size) ** 0.5
    np.testing.assert_allclose(counts(("embed", "table")), [0.5, 0.5], atol=tolerance)
    binomial_2, binomial_4 = np.array([1, 2, 1]) / 4, np.array([1, 4, 6, 4, 1]) / 16
    np.testing.assert_allclose(counts(("attention", "out", "bias")), binomial_2, atol=tolerance)
    every = counts(("attention", "out", "bias"), ("mlp", "down", "bias"))
    np.testing.assert_allclose(every, binomial_4, atol=tolerance)
