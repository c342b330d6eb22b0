"""Training a decoder with experts: what accumulation and meshes must not change, and what the routers' losses do."""

import jax
import numpy as np
import pytest

from lmjax.nn.moe import MoEConfig
from lmjax.ops.routing import RouterSums
from lmjax.train.router import router_loss, router_row
from tests import tiny
from tests.tiny import CONFIG

MOE = MoEConfig(
    num_experts=8,
    experts_per_token=2,
    pattern=("dense", "moe"),
    dense_first=1,
    expert_dim=24,
    choice_bias_rate=0.01,
    capacity_factor=1.0,
    jitter=0.1,
    balance_weight=0.5,
    z_weight=0.1,
)
EXPERTS = tiny.with_changes(CONFIG, num_layers=5, moe=MOE)
"""Dense, dense, experts, dense, experts."""


def with_moe(**changes):
    return tiny.with_changes(EXPERTS, moe=tiny.with_changes(MOE, **changes))


def first_moments(state):
    return next(part.mu for part in state.opt_state if hasattr(part, "mu"))


def biases(state) -> np.ndarray:
    leaves = jax.tree.leaves_with_path(state.params)
    return np.concatenate([np.asarray(leaf) for path, leaf in leaves if path[-1].key == "choice_bias"])


@pytest.fixture(scope="module")
def batches(request):
    rng = tiny.generator(request)
    return [tiny.packed_batch(rng, EXPERTS) for _ in range(2)]


@pytest.fixture(scope="module")
def big_batch():
    return tiny.Trainer(EXPERTS, tiny.mesh_of(2, 1, 1))


@pytest.fixture(scope="module")
def trained(big_batch, batches, request):
    return big_batch.train(batches, request.config.getoption("--seed"))


@pytest.mark.parametrize("accumulation", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulation_equals_the_big_batch_with_the_routers_losses(accumulation, batches, big_batch, trained, seed):
    accumulated = tiny.Trainer(EXPERTS, tiny.mesh_of(2, 1, 1), accumulation=accumulation)
    state, told = accumulated.train(batches, seed)
    for found, wanted in zip(told, trained[1], strict=True):
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-6)
        for name, one, other in zip(found.router._fields, found.router, wanted.router, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(biases(state), biases(trained[0]))
    states = [trainer.train(batches[:1], seed)[0] for trainer in (accumulated, big_batch)]
    tiny.assert_trees_close(*(gradients_of(state) for state in states), 5e-6)


def gradients_of(state):
    """All but those of the biases, which are zero."""
    leaves = jax.tree.leaves_with_path(first_moments(state))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if path[-1].key != "choice_bias"}


@pytest.mark.parametrize(
    "sizes",
    [(1, 2, 1, 4), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in [(2, 2, 2), (1, 2, 2, 2), (1, 1, 1, 8)])],
)
def test_every_mesh_trains_alike(sizes, batches, trained, seed):
    found = tiny.Trainer(EXPERTS, tiny.mesh_of(*sizes)).train(batches, seed)
    np.testing.assert_allclose(found[1][1].loss, trained[1][1].loss, rtol=2e-6)
    np.testing.assert_array_equal(found[1][0].router.load, trained[1][0].router.load)
    np.testing.assert_array_equal(biases(found[0]), biases(trained[0]))


def test_biases_move_by_the_loads_of_the_global_batch_and_by_nothing_else(batches, big_batch, seed):
    params = tiny.random_params(big_batch.blueprint, np.random.default_rng(seed))
    before = biases(big_batch.blueprint.state._replace(params=params))
    state, (told,) = big_batch.train(batches[:1], seed)
    load = told.router.load
    moved = 0.01 * np.sign(load.mean(axis=-1, keepdims=True) - load)
    assert np.abs(moved).max() > 0
    np.testing.assert_allclose(biases(state) - before, moved, atol=1e-6)
    assert not np.any(
        [leaf for path, leaf in jax.tree.leaves_with_path(first_moments(state)) if path[-1].key == "choice_bias"]
    )


def test_the_routers_losses_are_trained_on_and_not_reported(batches, trained, seed):
    without = tiny.Trainer(with_moe(balance_weight=0.0, z_weight=0.0), tiny.mesh_of(2, 1, 1))
    _, told = without.train(batches[:1], seed)
    assert told[0].loss == pytest.approx(trained[1][0].loss, rel=1e-6)
    assert abs(told[0].grad_norm / trained[1][0].grad_norm - 1) > 1e-3


def test_the_routers_losses_are_means_over_the_tokens_of_the_global_batch():
    sums = RouterSums(*(np.array([1.0, 3.0]) for _ in RouterSums._fields))
    assert router_loss(MOE, sums, 8) == pytest.approx((0.5 * 4 + 0.1 * 4) / 8)


def test_a_row_tells_of_each_block_with_experts(batches, trained):
    sums = trained[1][0].router
    row = router_row(sums, EXPERTS.blocks, MOE.experts_per_token)
    assert list(row) == ["2", "4"]
    tokens = float((batches[0].segment_ids > 0).sum())
    for i, told in enumerate(row.values()):
        assert sum(told["load"]) == pytest.approx(1, abs=1e-5)
        assert told["dropped"] == pytest.approx(float(sums.dropped[i]) / (2 * tokens), abs=1e-6)
        assert 0 < told["dropped"] < 1
        assert 0 < told["entropy"] < np.log(8)
        assert told["balance"] > 1
        assert told["not_finite"] == 0
