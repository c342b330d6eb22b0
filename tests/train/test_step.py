import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.ops.cross_entropy import LossOptions
from lmjax.train.state import TrainState
from lmjax.train.step import DeviceBatch, loss_sums
from tests import tiny
from tests.tiny import CONFIG, LOSS


def first_moments(state: TrainState):
    """After one update, in proportion to the clipped gradient."""
    return next(part.mu for part in state.opt_state if hasattr(part, "mu"))


@pytest.fixture(scope="module")
def batches(request):
    """Batches whose rows have unequal numbers of targets."""
    rng = tiny.generator(request)
    return [tiny.packed_batch(rng, CONFIG) for _ in range(3)]


@pytest.fixture(scope="module")
def big_batch():
    return tiny.Trainer(CONFIG, tiny.mesh_of(2, 1, 1))


@pytest.mark.parametrize("accumulation", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulation_equals_the_big_batch(accumulation, batches, big_batch, seed):
    accumulated = tiny.Trainer(CONFIG, tiny.mesh_of(2, 1, 1), accumulation=accumulation)
    _, expected = big_batch.train(batches, seed)
    for found, wanted in zip(accumulated.train(batches, seed)[1], expected, strict=True):
        np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-6)
        np.testing.assert_allclose(found.grad_norm, wanted.grad_norm, rtol=1e-6)
        assert found.tokens == wanted.tokens
        assert found.learning_rate == wanted.learning_rate
    states = [trainer.train(batches[:1], seed)[0] for trainer in (accumulated, big_batch)]
    tiny.assert_trees_close(*(first_moments(state) for state in states), 5e-6)
    # The micro-batches have unequal numbers of targets, so that the mean of their means would be another loss.
    means = []
    for micro_batch in range(accumulation):
        mine = np.arange(tiny.ROWS)[:, None] % accumulation == micro_batch
        alone = batches[0]._replace(weights=np.where(mine, batches[0].weights, 0))
        means.append(accumulated.train([alone], seed)[1][0].loss)
    assert abs(np.mean(means) - expected[0].loss) > 1e-4 * expected[0].loss


def test_loss_is_the_mean_over_weighted_targets_and_tokens_their_number(batches, big_batch, seed):
    batch = batches[0]
    told = big_batch.train([batch], seed)[1][0]
    assert told.tokens == batch.weights.sum()
    assert told.loss == pytest.approx(np.log(CONFIG.vocab_size), rel=0.3)
    without_weight = batch._replace(targets=np.where(batch.weights > 0, batch.targets, 7))
    assert big_batch.train([without_weight], seed)[1][0] == told
    doubled = big_batch.train([batch._replace(weights=2 * batch.weights)], seed)[1][0]
    assert doubled.loss == pytest.approx(told.loss, rel=1e-6)
    assert doubled.tokens == 2 * told.tokens


def is_bfloat16(leaf: np.ndarray) -> bool:
    return bool((leaf == leaf.astype(jnp.bfloat16).astype(np.float32)).all())


def test_bfloat16_compute_and_the_dtype_of_gradient_reduction(batches, big_batch, seed):
    """With reduction in the compute dtype, gradients of matrices are bfloat16 numbers; in float32 they are not."""
    blueprint = big_batch.blueprint
    params = tiny.state_of(blueprint, tiny.random_params(blueprint, np.random.default_rng(seed))).params
    batch = DeviceBatch(*tiny.by_rows(blueprint.mesh, *batches[0]))

    def value_and_gradient(execution):
        def loss(params):
            sums, _ = loss_sums(blueprint.decoder(params), batch, execution, LOSS)
            return sums.loss / sums.weight

        with jax.set_mesh(blueprint.mesh):
            value, grads = jax.device_get(jax.jit(jax.value_and_grad(loss))(params))
        return value, jax.tree.leaves_with_path(grads)

    half = tiny.execution(compute_dtype=jnp.dtype("bfloat16"))
    value, rounded = value_and_gradient(half)
    same, precise = value_and_gradient(dataclasses.replace(half, reduce_in_float32=True))
    exact = big_batch.train(batches[:1], seed)[1][0].loss
    assert value == pytest.approx(same, rel=1e-6)
    assert 1e-6 < abs(value / exact - 1) < 1e-2
    for (path, leaf), (_, fine) in zip(rounded, precise, strict=True):
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == fine.dtype == np.float32, name
        assert is_bfloat16(leaf) == (path[-1].key == "kernel"), name
        assert not is_bfloat16(fine), name
        assert np.linalg.norm(leaf - fine) < 0.02 * np.linalg.norm(fine), name


def test_z_loss_is_trained_on_and_not_reported(batches, big_batch, seed):
    """The gradient is that of the mean of nll + 0.1 x log_normaliser^2; the loss that is told is the nll's."""
    blueprint = big_batch.blueprint
    step = tiny.jitted_step(blueprint, loss=LossOptions(z_loss=0.1, chunk_tokens=24))
    params = tiny.random_params(blueprint, np.random.default_rng(seed))
    with jax.set_mesh(blueprint.mesh):
        _, told = step(tiny.state_of(blueprint, params), tiny.to_mesh(batches[0], blueprint.mesh))
    plain = big_batch.train(batches[:1], seed)[1][0]
    assert float(told.loss) == pytest.approx(plain.loss, rel=1e-6)
    assert float(told.grad_norm) > 1.01 * plain.grad_norm
