"""The layer of experts against a dense loop over all of them, in values and gradients, on one device and on many."""

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import InputError
from lmjax.nn.moe import MoE, MoEConfig, moved_bias
from tests.nn.modules import as_function, on_mesh
from tests.tiny import FLOAT32, by_rows, mesh_of

B, T, D, F, E = 8, 6, 8, 16, 4
EXPERT_MESHES = [
    (1, 2, 2, 2),
    *(
        pytest.param(sizes, marks=pytest.mark.slow)
        for sizes in [(2, 1, 1, 4), (2, 2, 2, 1), (1, 1, 4, 2), (2, 2, 1, 2)]
    ),
]
"""Sizes of data, fsdp, tensor and expert."""
SWITCH = {"experts_per_token": 1, "renormalize": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"experts_per_token": 2},
    "switch": SWITCH,
    "softmax of the chosen": {"experts_per_token": 3, "softmax_over": "chosen"},
    "shared expert": {"experts_per_token": 2, "renormalize": False, "shared_dim": 8, "shared_gate": True},
    "deepseek": {
        "experts_per_token": 2,
        "scores": "sigmoid",
        "weight_scale": 2.5,
        "groups": 2,
        "top_groups": 1,
        "choice_bias_rate": 0.001,
        "shared_dim": 8,
    },
}


def make(*, gated: bool = True, **options: Any) -> MoE:
    """Every parameter random, the router's large enough for clear choices."""
    config = MoEConfig(num_experts=E, **options)
    moe = MoE(config, D, F, activation="silu", gated=gated, output_std=0.3, key=jax.random.key(0))
    rng = np.random.default_rng(3)
    build, parameters = as_function(moe)

    def draw(path, leaf):
        scale = {"matrix": 1.0, "choice_bias": 0.2}.get(path[-1].key, 0.5)
        return jnp.asarray(scale * rng.standard_normal(leaf.shape).astype(np.float32))

    return build(jax.tree_util.tree_map_with_path(draw, parameters))


def by_loop(moe: MoE, x_BTD: jax.Array, valid_BT: jax.Array) -> jax.Array:
    """Every expert on every token, then the weighted sum of the chosen ones: DeepSeek-V3's and Mixtral's equations."""
    config = moe.config
    logits = x_BTD @ moe.router.matrix[...]
    scores = jax.nn.softmax(logits) if config.scores == "softmax" else jax.nn.sigmoid(logits)
    preference = scores if moe.router.choice_bias is None else scores + moe.router.choice_bias[...]
    if config.groups > 1:  # two experts a group here: both are its best two
        of_group = preference.reshape(B, T, config.groups, -1).sum(-1, keepdims=True)
        best = of_group == of_group.max(2, keepdims=True)
        preference = jnp.where(
            jnp.broadcast_to(best, (B, T, config.groups, E // config.groups)).reshape(B, T, E), preference, -9
        )
    rank = jnp.sum(preference[..., None, :] > preference[..., None], axis=-1)
    chosen = rank < config.experts_per_token
    if config.softmax_over == "chosen":
        weights = jax.nn.softmax(jnp.where(chosen, logits, -jnp.inf))
    else:
        weights = jnp.where(chosen, scores, 0)
        weights = weights / weights.sum(-1, keepdims=True) if config.renormalize else weights
    weights = weights * config.weight_scale * valid_BT[..., None]
    total = jnp.zeros_like(x_BTD)
    for expert in range(E):
        up = x_BTD @ moe.up.kernel[...][expert]
        hidden = jax.nn.silu(up) if moe.gate is None else jax.nn.silu(x_BTD @ moe.gate.kernel[...][expert]) * up
        total += weights[..., expert, None] * (hidden @ moe.down.kernel[...][expert])
    if moe.shared is not None:
        assert moe.shared.gate is not None
        hidden = jax.nn.silu(x_BTD @ moe.shared.gate.kernel[...]) * (x_BTD @ moe.shared.up.kernel[...])
        shared = hidden @ moe.shared.down.kernel[...]
        total += shared if moe.shared_gate is None else jax.nn.sigmoid(x_BTD @ moe.shared_gate.kernel[...]) * shared
    return total


def value_and_gradients(function, moe: MoE, mesh, *arrays: np.ndarray) -> Any:
    """``function(moe, x, …)``, and the gradients of its weighted sum by all parameters and x, on the host.

    Without a mesh, on one device that knows of none.
    """
    build, parameters = as_function(moe)
    if mesh is not None:
        _, parameters = as_function(on_mesh(moe, mesh))

    def weighted(parameters, *arrays):
        y, *rest = function(build(parameters), *arrays)
        ramp = jnp.arange(y.size, dtype=y.dtype).reshape(y.shape) / y.size
        if mesh is not None:
            ramp = jax.sharding.reshard(ramp, jax.typeof(y).sharding.spec)
        return jnp.sum(y * ramp), (y, rest)

    run = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        (_, told), gradients = run(parameters, *(arrays if mesh is None else by_rows(mesh, *arrays)))
        return jax.device_get((told, gradients))


def assert_close(found: Any, expected: Any, tolerance: float = 2e-6) -> None:
    pairs = zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True)
    for (path, one), other in pairs:
        scale = max(np.abs(other).max(), 1e-3)
        np.testing.assert_allclose(one / scale, other / scale, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.fixture
def x(rng) -> np.ndarray:
    return rng.standard_normal((B, T, D)).astype(np.float32)


@pytest.fixture
def valid(rng) -> np.ndarray:
    return np.arange(T) < rng.integers(2, T + 1, (B, 1))


def ours(moe, x, valid):
    return moe(x, valid, FLOAT32)


@pytest.mark.parametrize("capacity_factor", [None, E])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_layer_is_a_loop_over_all_experts(x, valid, name, capacity_factor):
    """Both ways of dispatch, with room for all."""
    moe = make(**CONFIGS[name], capacity_factor=capacity_factor)
    mesh = mesh_of(1, 1, 1)
    (found, (sums,)), gradients = value_and_gradients(ours, moe, mesh, x, valid)
    (expected, _), wanted = value_and_gradients(lambda *all: (by_loop(*all),), moe, None, x, valid)
    wanted[0].get("router", {}).pop("choice_bias", None)
    moved = gradients[0]["router"].pop("choice_bias", 0.0)
    assert not np.any(moved), "the bias of the choice learns nothing from the loss"
    assert_close((found, gradients), (expected, wanted))
    assert sums.load.sum() == valid.sum() * moe.config.experts_per_token
    assert sums.dropped == 0
    other = make(**(CONFIGS[name] | {"experts_per_token": 3 - moe.config.experts_per_token % 2, "groups": 1}))
    assert np.abs(found - np.asarray(by_loop(other, jnp.asarray(x), jnp.asarray(valid)))).max() > 1e-2


def ragged(moe, x, valid):
    return moe(x, valid, dataclasses.replace(FLOAT32, expert_exchange="ragged"))


@pytest.mark.parametrize(("function", "capacity_factor"), [(ours, None), (ragged, None), (ours, 1.0)])
@pytest.mark.parametrize("sizes", EXPERT_MESHES)
def test_every_mesh_gives_one_answer(x, valid, sizes, function, capacity_factor):
    """Tokens gathered along the experts, each sent to its own, and in slots."""
    moe = make(**CONFIGS["shared expert"], capacity_factor=capacity_factor)
    found = value_and_gradients(function, moe, mesh_of(*sizes), x, valid)
    expected = value_and_gradients(ours, moe, mesh_of(1, 1, 1), x, valid)
    assert_close(found, expected)
    assert (expected[0][1][0].dropped > 0) == (capacity_factor is not None)


@pytest.mark.fast
def test_padding_goes_to_no_expert_and_counts_nowhere(x, valid):
    moe, mesh = make(**CONFIGS["mixtral"]), mesh_of(1, 1, 1)
    noise = np.where(valid[..., None], x, 100 * x)
    (found, (sums,)), gradients = value_and_gradients(ours, moe, mesh, x, valid)
    (same, (same_sums,)), same_gradients = value_and_gradients(ours, moe, mesh, noise, valid)
    assert not found[~valid].any()
    assert_close((found, sums, gradients), (same, same_sums, same_gradients), 0)
    (_, (all_sums,)), _ = value_and_gradients(ours, moe, mesh, x, np.ones_like(valid))
    assert np.abs(all_sums.z - sums.z) > 1e-2


@pytest.mark.fast
def test_one_expert_is_the_dense_mlp(x, valid):
    config = MoEConfig(num_experts=1, experts_per_token=1)
    moe = MoE(config, D, F, activation="silu", gated=True, output_std=0.3, key=jax.random.key(0))
    (found, _), _ = value_and_gradients(ours, moe, mesh_of(1, 1, 1), x, np.ones_like(valid))
    hidden = jax.nn.silu(x @ moe.gate.kernel[...][0]) * (x @ moe.up.kernel[...][0])  # pyright: ignore[reportOptionalMemberAccess]
    np.testing.assert_allclose(found, hidden @ moe.down.kernel[...][0], rtol=1e-5, atol=1e-7)


@pytest.mark.fast
def test_the_order_of_the_experts_does_not_matter(x, valid):
    moe, mesh = make(**CONFIGS["mixtral"]), mesh_of(1, 1, 1)
    build, parameters = as_function(moe)
    order = np.array([2, 0, 3, 1])
    permuted = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf[:, order] if path[-1].key == "matrix" else leaf[order], parameters
    )
    both = (value_and_gradients(ours, each, mesh, x, valid)[0] for each in (moe, build(permuted)))
    (found, (sums,)), (other, (other_sums,)) = both
    np.testing.assert_allclose(found, other, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(sums.load)[order], other_sums.load)


@pytest.mark.fast
def test_a_new_routers_logits_have_variance_1_whatever_the_width():
    for width in (64, 1024):
        moe = MoE(
            MoEConfig(num_experts=64, experts_per_token=2),
            width,
            16,
            activation="silu",
            gated=True,
            output_std=0.3,
            key=jax.random.key(0),
        )
        x = np.random.default_rng(1).standard_normal((500, width)).astype(np.float32)
        assert np.asarray(x @ moe.router.matrix[...]).var() == pytest.approx(1, rel=0.06)
        assert moe.up.kernel[...].std() == pytest.approx(0.02, rel=0.02)


@pytest.mark.fast
def test_generation_drops_nothing(x, valid):
    moe, mesh = make(**SWITCH, capacity_factor=0.5), mesh_of(1, 1, 1)

    def generating(moe, x, valid):
        return moe(x, valid, FLOAT32, may_drop=False)

    (some, (dropping,)), (found, (sums,)) = (
        value_and_gradients(function, moe, mesh, x, valid)[0] for function in (ours, generating)
    )
    assert sums.dropped == 0
    np.testing.assert_allclose(found, by_loop(moe, jnp.asarray(x), jnp.asarray(valid)), atol=2e-6)
    is_dropped = ~some.any(-1) & valid
    assert is_dropped.sum() == dropping.dropped > 0


def test_jitter_is_drawn_in_training_and_the_same_on_every_mesh(x, valid):
    moe = make(**SWITCH, jitter=0.3)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(5), jnp.arange(B))
    data = np.asarray(jax.random.key_data(keys))

    def noisy(moe, x, valid, data):
        return moe(x, valid, FLOAT32, keys_B=jax.random.wrap_key_data(data))

    found, same = (value_and_gradients(noisy, moe, mesh_of(*sizes), x, valid, data) for sizes in ((2, 2, 2), (1, 1, 1)))
    assert_close(found, same)
    plain = value_and_gradients(ours, moe, mesh_of(1, 1, 1), x, valid)
    assert np.abs(same[0][0] - plain[0][0]).max() > 1e-3
    assert same[0][1][0].entropy != plain[0][1][0].entropy


@pytest.mark.fast
def test_the_bias_of_a_choice_moves_towards_even_loads():
    bias = np.array([[0.5, 0.0, -0.5], [1.0, 1.0, 1.0]], np.float32)
    load = np.array([[10.0, 4.0, 1.0], [3.0, 3.0, 3.0]], np.float32)
    np.testing.assert_allclose(moved_bias(bias, load, 0.1), [[0.4, 0.1, -0.4], [1.0, 1.0, 1.0]], rtol=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 5}, "experts_per_token is 5 and num_experts is 4"),
        ({"experts_per_token": 0}, "experts_per_token is 0; it has to be 1 or more"),
        ({"experts_per_token": 1}, "the router learns nothing"),
        ({"groups": 3}, "4 mod 3 = 1"),
        ({"groups": 2, "top_groups": 3}, "top_groups is 3 and groups is 2"),
        ({"groups": 4, "top_groups": 1}, "1 of 4 groups have 1 experts"),
        ({"pattern": ("dense",)}, "it has to name a moe block"),
        ({"softmax_over": "chosen", "scores": "sigmoid"}, "scores is sigmoid and softmax_over is chosen"),
        ({"softmax_over": "chosen", "renormalize": False}, "renormalize is False and softmax_over is chosen"),
        ({"shared_gate": True}, "shared_gate has an effect with shared_dim only"),
        ({"jitter": 1.0}, "jitter is 1.0"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0; it has to be above 0"),
        ({"balance_weight": -1.0}, "balance_weight is -1.0; it has to be 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        MoEConfig(**({"num_experts": E, "experts_per_token": 2} | changes))
