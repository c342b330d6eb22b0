import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.ops.cross_entropy import LossOptions
from lmjax.train.step import DeviceBatch, loss_sums
from tests import tiny
from tests.tiny import CONFIG, LOSS


def first_moments(state):
    """Proportional to the clipped gradient after one update."""
    moments = [part.mu for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")]
    return moments[0]


@pytest.fixture(scope="module")
def setting(request):
    """Batches whose rows have unequal numbers of targets."""
    rng = tiny.generator(request)
    batches = [tiny.packed_batch(rng, CONFIG) for _ in range(3)]
    return batches, request.config.getoption("--seed")


def run(setting, accumulation: int, batches=None):
    mesh = tiny.mesh_of(2, 1, 1)
    rng = np.random.default_rng(setting[1] + 1)
    return tiny.train(CONFIG, mesh, batches or setting[0], rng, accumulation=accumulation)


@pytest.fixture(scope="module")
def big_batch(setting):
    return run(setting, 1)


@pytest.mark.parametrize("accumulation", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulation_equals_the_big_batch(accumulation, setting, big_batch):
    state, metrics = run(setting, accumulation)
    expected_state, expected = big_batch
    for found, wanted in zip(metrics, expected, strict=True):
        np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-6)
        np.testing.assert_allclose(found.grad_norm, wanted.grad_norm, rtol=1e-6)
        assert found.tokens == wanted.tokens
        assert found.learning_rate == wanted.learning_rate
    tiny.assert_trees_close(first_moments(state), first_moments(expected_state), 1e-5)
    # The micro-batches have unequal numbers of targets, so that the mean of their means would be another loss.
    batch = setting[0][0]
    means = []
    for micro_batch in range(accumulation):
        weights = np.where(np.arange(tiny.ROWS)[:, None] % accumulation == micro_batch, batch.weights, 0)
        means.append(run(setting, accumulation, [batch._replace(weights=weights)])[1][0].loss)
    assert abs(np.mean(means) - expected[0].loss) > 1e-4 * expected[0].loss


def test_loss_is_the_mean_over_weighted_targets_and_tokens_their_number(setting, big_batch):
    """Targets without a weight do not matter."""
    batch = setting[0][0]
    other = batch._replace(targets=np.where(batch.weights > 0, batch.targets, 7))
    told = run(setting, 1, [other])[1][0]
    assert told == big_batch[1][0]
    assert told.tokens == batch.weights.sum()
    assert told.loss == pytest.approx(np.log(CONFIG.vocab_size), rel=0.3)
    doubled = run(setting, 1, [batch._replace(weights=2 * batch.weights)])[1][0]
    assert doubled.loss == pytest.approx(told.loss, rel=1e-6)
    assert doubled.tokens == 2 * told.tokens


def gradient(blueprint, params, batch, execution, options=LOSS):
    def loss(params):
        return loss_sums(blueprint.decoder(params), batch, execution, options).loss

    with jax.set_mesh(blueprint.mesh):
        return jax.jit(jax.grad(loss))(params)


def is_bfloat16(leaf) -> bool:
    return bool(jnp.all(leaf == leaf.astype(jnp.bfloat16).astype(jnp.float32)))


def test_bfloat16_compute_and_the_dtype_of_gradient_reduction(rng):
    """With reduction in the compute dtype, gradients of matrices are bfloat16 numbers; in float32 they are not."""
    blueprint = tiny.blueprint_of(CONFIG, tiny.mesh_of(2, 1, 1))
    params = tiny.state_of(blueprint, tiny.random_params(blueprint, rng)).params
    batch = DeviceBatch(*tiny.by_rows(blueprint.mesh, *tiny.packed_batch(rng, CONFIG)))
    exact = gradient(blueprint, params, batch, tiny.FLOAT32)
    half = tiny.execution(compute_dtype=jnp.dtype("bfloat16"))
    rounded = gradient(blueprint, params, batch, half)
    precise = gradient(blueprint, params, batch, tiny.execution(compute_dtype=half.compute_dtype, reduce_in_float32=True))
    for (path, leaf), fine, true in zip(
        jax.tree.leaves_with_path(rounded), jax.tree.leaves(precise), jax.tree.leaves(exact), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == fine.dtype == jnp.float32, name
        is_projection = path[-1].key == "kernel"
        assert is_bfloat16(leaf) == is_projection, name
        assert not is_bfloat16(fine), name
        for found in (leaf, fine):
            assert jnp.linalg.norm(found - true) < 0.05 * jnp.linalg.norm(true), name
            assert jnp.linalg.norm(found - true) > 1e-5 * jnp.linalg.norm(true), name


def test_z_loss_is_trained_on_and_not_reported(setting, rng):
    blueprint = tiny.blueprint_of(CONFIG, tiny.mesh_of(1, 1, 1))
    step = tiny.jitted_step(blueprint, loss=LossOptions(z_loss=0.1, chunk_tokens=24))
    batch = tiny.to_mesh(setting[0][0], blueprint.mesh)
    params = tiny.random_params(blueprint, np.random.default_rng(setting[1] + 1))
    with jax.set_mesh(blueprint.mesh):
        _, told = step(tiny.state_of(blueprint, params), batch)
    plain = run(setting, 1)[1][0]
    assert float(told.loss) == pytest.approx(plain.loss, rel=1e-6)
    assert float(told.grad_norm) > 1.01 * plain.grad_norm
