"""Choices, weights and the sums over them are those of plain loops in float64, and those of transformers' routers.

Legend: B batch, T positions, E experts, K choices of a token, G groups of experts.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmjax.ops.routing import RouterOptions, RouterSums, Routing, route, router_sums
from tests.ops.sharded import BATCH, run_on

B, T, E, K = 3, 7, 8, 3
choose = jax.jit(route, static_argnums=2)
SWITCH = RouterOptions(num_experts=E, experts_per_token=1, renormalize=False)
MIXTRAL = RouterOptions(num_experts=E, experts_per_token=K)
DEEPSEEK = RouterOptions(num_experts=E, experts_per_token=K, scores="sigmoid", scale=2.5, groups=4, top_groups=2)
OPTIONS = {
    "switch": SWITCH,
    "mixtral": MIXTRAL,
    "scores as they are": dataclasses.replace(MIXTRAL, renormalize=False),
    "softmax of the chosen": dataclasses.replace(MIXTRAL, softmax_over="chosen", scale=0.5),
    "sigmoid": dataclasses.replace(DEEPSEEK, groups=1, top_groups=1, renormalize=False),
    "deepseek": DEEPSEEK,
    "groups of one": dataclasses.replace(DEEPSEEK, groups=E, top_groups=K + 1),
    "softmax in groups": dataclasses.replace(MIXTRAL, groups=2, top_groups=1),
    "all of them": dataclasses.replace(MIXTRAL, experts_per_token=E),
}
GAP = 1e-3
"""By how much preferences differ at least, so that no rounding and no small step changes a choice."""


@functools.partial(jax.jit, static_argnames=("options", "batch_axes"))
def sums_of(logits, kept, valid, options: RouterOptions, batch_axes: tuple[str, ...] = ()) -> RouterSums:
    """What the router did with these logits and no bias."""
    return router_sums(logits, route(logits, None, options), kept, valid, options, batch_axes)


def scores_of(logits: np.ndarray, options: RouterOptions) -> list[float]:
    if options.scores == "sigmoid":
        return [1 / (1 + math.exp(-logit)) for logit in logits]
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


def preferences_of(logits: np.ndarray, bias: np.ndarray | None, options: RouterOptions) -> tuple[list, list]:
    """The preference of each expert, and of each group."""
    preferences = [score + (0 if bias is None else bias[e]) for e, score in enumerate(scores_of(logits, options))]
    size = len(preferences) // options.groups
    groups = [sorted(preferences[g * size : (g + 1) * size])[-2:] for g in range(options.groups)]
    return preferences, [sum(best) for best in groups]


def routed(logits: np.ndarray, bias: np.ndarray | None, options: RouterOptions) -> tuple[list, list, list]:
    """The choices, weights and scores of one token."""
    preferences, of_groups = preferences_of(logits, bias, options)
    best_groups = sorted(range(options.groups), key=lambda g: (-of_groups[g], g))[: options.top_groups]
    eligible = [e for e in range(len(logits)) if e // (len(logits) // options.groups) in best_groups]
    experts = sorted(eligible, key=lambda e: (-preferences[e], e))[: options.experts_per_token]
    scores = scores_of(logits, options)
    if options.softmax_over == "chosen":
        weights = [math.exp(logits[e]) / sum(math.exp(logits[i]) for i in experts) for e in experts]
    else:
        weights = [scores[e] for e in experts]
    divisor = sum(weights) if options.renormalize else 1
    return experts, [options.scale * weight / divisor for weight in weights], [s / sum(scores) for s in scores]


def all_routed(logits: np.ndarray, bias: np.ndarray | None, options: RouterOptions) -> Routing:
    """Every token of (tokens, experts) logits, in float64."""
    return Routing(*(np.array(part) for part in zip(*(routed(row, bias, options) for row in logits), strict=True)))


def separated(rng: np.random.Generator, count: int, bias: np.ndarray | None, options: RouterOptions) -> np.ndarray:
    """(count, E) float32 logits whose preferences, and those of groups, differ by ``GAP`` or more."""
    rows = []
    while len(rows) < count:
        logits = rng.normal(size=E).astype(np.float32)
        if all(np.all(np.diff(np.sort(values)) > GAP) for values in preferences_of(logits, bias, options)):
            rows.append(logits)
    return np.array(rows)


def random_bias(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=E).astype(np.float32)


def finite_differences(function, at: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """The gradient of a scalar function of float64 numbers."""
    gradient = np.zeros(at.shape)
    for place in np.ndindex(at.shape):
        change = np.zeros(at.shape)
        change[place] = step
        gradient[place] = (function(at + change) - function(at - change)) / (2 * step)
    return gradient


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
def test_choices_and_weights_are_those_of_a_plain_loop(rng, name, has_bias):
    options = OPTIONS[name]
    bias = random_bias(rng) if has_bias else None
    logits = separated(rng, 40, bias, options)
    found, expected = choose(logits, bias, options), all_routed(logits, bias, options)
    np.testing.assert_array_equal(found.experts, expected.experts)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=2e-6)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=2e-6, atol=1e-7)
    assert found.weights.dtype == found.scores.dtype == np.float32
    others = all_routed(np.roll(logits, 1, axis=0), bias, options)
    assert not np.allclose(found.weights, others.weights, rtol=1e-2) or options.experts_per_token == E


@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_of_the_weights_equals_finite_differences(rng, name):
    options, bias = OPTIONS[name], random_bias(rng)
    logits = separated(rng, 4, bias, options)
    dy = rng.normal(size=(4, options.experts_per_token)).astype(np.float32)
    found = jax.grad(lambda logits: jnp.sum(choose(logits, bias, options).weights * dy))(logits)
    expected = finite_differences(lambda at: np.sum(all_routed(at, bias, options).weights * dy), logits.astype(float))
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert not np.allclose(found, np.roll(expected, 1, axis=0), atol=1e-2)


@pytest.mark.fast
def test_of_equal_experts_and_groups_the_lower_number_is_chosen():
    logits = np.array([[1, 2, 2, 0, 2, 1, 0, 2], [0] * 8], np.float32)
    np.testing.assert_array_equal(choose(logits, None, MIXTRAL).experts, [[1, 2, 4], [0, 1, 2]])
    np.testing.assert_array_equal(choose(logits, None, DEEPSEEK).experts, [[1, 4, 0], [0, 1, 2]])
    raised = np.zeros(E, np.float32)
    raised[5] = 1e-3
    np.testing.assert_array_equal(choose(logits, raised, MIXTRAL).experts[1], [5, 0, 1])


@pytest.mark.fast
def test_a_bias_changes_what_is_chosen_and_no_weight(rng):
    logits = separated(rng, 1, None, DEEPSEEK)
    options = dataclasses.replace(DEEPSEEK, groups=1, top_groups=1, renormalize=False, scale=1)
    plain = choose(logits, None, options)
    bias = np.zeros(E, np.float32)
    unchosen = min(set(range(E)) - set(np.asarray(plain.experts)[0].tolist()))
    bias[unchosen] = 5.0
    found = choose(logits, bias, options)
    assert found.experts[0, 0] == unchosen
    np.testing.assert_array_equal(found.weights[0, 1:], plain.weights[0, :-1])
    np.testing.assert_allclose(found.weights[0, 0], scores_of(logits[0], options)[unchosen], rtol=1e-6)
    gradient = jax.grad(lambda bias: jnp.sum(choose(logits, bias, options).weights))(bias)
    np.testing.assert_array_equal(gradient, np.zeros(E))


@pytest.mark.fast
@pytest.mark.parametrize("name", ["mixtral", "deepseek"])
def test_logits_that_are_not_finite_still_choose_experts_that_exist(name):
    logits = np.zeros((4, E), np.float32)
    logits[0, 2], logits[1, :], logits[2, 5] = np.nan, np.nan, np.inf
    experts = np.asarray(choose(logits, None, OPTIONS[name]).experts)
    assert experts.min() >= 0
    assert experts.max() < E
    assert all(len(set(row)) == K for row in experts.tolist())


def test_routing_is_that_of_deepseek_v3(rng):
    torch = pytest.importorskip("torch")
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = deepseek.DeepseekV3Config(
        hidden_size=E,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    bias = random_bias(rng)
    logits = separated(rng, 40, bias, DEEPSEEK)
    router = deepseek.DeepseekV3TopkRouter(config)
    router.load_state_dict({"weight": torch.eye(E), "e_score_correction_bias": torch.from_numpy(bias)})
    with torch.no_grad():
        _, weights, experts = router(torch.from_numpy(logits))

    def by_expert(experts, weights):
        dense = np.zeros((len(logits), E), np.float32)
        np.put_along_axis(dense, np.asarray(experts), np.asarray(weights), axis=1)
        return dense

    expected = by_expert(experts, weights)
    for ours, is_equal in ((bias, True), (np.roll(bias, 1), False), (None, False)):
        routing = choose(logits, ours, DEEPSEEK)
        assert np.allclose(by_expert(routing.experts, routing.weights), expected, atol=1e-6) == is_equal


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_routing_is_that_of_softmax_routers(rng, name):
    torch = pytest.importorskip("torch")
    logits = separated(rng, 40, None, MIXTRAL)
    if name == "mixtral":
        mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
        config = mixtral.MixtralConfig(hidden_size=E, num_local_experts=E, num_experts_per_tok=K)
        router, options = mixtral.MixtralTopKRouter(config), MIXTRAL
    else:
        qwen = pytest.importorskip("transformers.models.qwen2_moe.modeling_qwen2_moe")
        config = qwen.Qwen2MoeConfig(hidden_size=E, num_experts=E, num_experts_per_tok=K, norm_topk_prob=False)
        router, options = qwen.Qwen2MoeTopKRouter(config), dataclasses.replace(MIXTRAL, renormalize=False)
    router.load_state_dict({"weight": torch.eye(E)})
    with torch.no_grad():
        _, weights, experts = router(torch.from_numpy(logits))
    found = choose(logits, None, options)
    np.testing.assert_array_equal(found.experts, experts.numpy())
    np.testing.assert_allclose(found.weights, weights.numpy(), rtol=2e-6)
    other = choose(logits, None, dataclasses.replace(options, renormalize=not options.renormalize))
    assert not np.allclose(other.weights, weights.numpy(), rtol=1e-2)


def some_tokens(rng: np.random.Generator, options: RouterOptions, rows: int = B) -> tuple[np.ndarray, ...]:
    """Logits (rows, T, E), kept (rows, T, K) and valid (rows, T), the last row without a valid token."""
    logits = separated(rng, rows * T, None, options).reshape(rows, T, E)
    valid = rng.random((rows, T)) < 0.7
    valid[-1] = False
    valid[:-1, 0] = True
    kept = (rng.random((rows, T, options.experts_per_token)) < 0.6) & valid[..., None]
    return logits, kept, valid


def summed(logits, kept, valid, options: RouterOptions) -> RouterSums:
    """The sums over tokens, one after the other in float64; ``kept`` may be None."""
    rows = [
        [(token, *routed(row[token], None, options)) for token in range(len(row)) if valid[b, token]]
        for b, row in enumerate(logits)
    ]
    load, balance, z, dropped, entropy = np.zeros(E), 0.0, 0.0, 0, 0.0
    pools = rows if options.balance_over == "sequence" else [[token for row in rows for token in row]]
    for pool in pools:
        share, score = np.zeros(E), np.zeros(E)
        for _, experts, _, scores in pool:
            for expert in experts:
                share[expert] += 1 / (len(pool) * options.experts_per_token)
            score += np.array(scores) / len(pool)
        balance += len(pool) * E * np.sum(share * score)
    for b, row in enumerate(rows):
        for token, experts, _, scores in row:
            load[experts] += 1
            z += math.log(sum(math.exp(logit) for logit in logits[b, token])) ** 2
            entropy -= sum(score * math.log(score) for score in scores)
            dropped += 0 if kept is None else np.sum(~kept[b, token])
    return RouterSums(balance, z, load, dropped, entropy, 0.0)


@pytest.mark.parametrize("name", ["switch", "mixtral", "deepseek"])
@pytest.mark.parametrize("balance_over", ["sequence", "batch"])
def test_sums_and_their_gradients_are_those_of_a_plain_loop(rng, name, balance_over):
    options = dataclasses.replace(OPTIONS[name], balance_over=balance_over)
    logits, kept, valid = some_tokens(rng, options)

    found = sums_of(logits, kept, valid, options)
    expected = summed(logits, kept, valid, options)
    for field, one, other in zip(RouterSums._fields, found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, err_msg=field)
        assert one.dtype == np.float32
    gradients = jax.jit(jax.jacrev(lambda logits: sums_of(logits, kept, valid, options)))(logits)
    for field in ("balance", "z"):
        found = np.asarray(getattr(gradients, field))
        differences = finite_differences(
            lambda at, field=field: getattr(summed(at, kept, valid, options), field), logits.astype(float)
        )
        np.testing.assert_allclose(found, differences, atol=1e-5)
        assert np.abs(found).max() > 1e-2
        assert not np.any(found[~valid])
    assert not any(np.any(getattr(gradients, field)) for field in ("load", "dropped", "entropy", "not_finite"))


@pytest.mark.fast
@pytest.mark.parametrize("balance_over", ["sequence", "batch"])
def test_balance_is_one_a_token_where_choices_are_even_and_more_where_all_are_one(balance_over):
    options = dataclasses.replace(SWITCH, balance_over=balance_over)
    even = np.tile(1e-4 * np.eye(E, dtype=np.float32), (2, 1, 1))
    one = np.tile(20 * np.eye(E, dtype=np.float32)[0], (2, E, 1))
    valid = np.ones((2, E), bool)
    for logits, expected in ((even, 1.0), (one, float(E))):
        balance = sums_of(logits, None, valid, options).balance
        np.testing.assert_allclose(balance / (2 * E), expected, rtol=1e-5)


def test_pooled_balance_is_the_load_balancing_loss_of_transformers(rng):
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    options = dataclasses.replace(MIXTRAL, balance_over="batch")
    logits, _, valid = some_tokens(rng, options)
    theirs = mixtral.load_balancing_loss_func(
        (torch.from_numpy(logits.reshape(-1, E)),), E, K, torch.from_numpy(valid.astype(np.float32))
    )
    for balance_over, is_equal in (("batch", True), ("sequence", False)):
        options = dataclasses.replace(options, balance_over=balance_over)
        balance = sums_of(logits, None, valid, options).balance
        assert np.allclose(balance / valid.sum(), theirs.item() / K, rtol=1e-5) == is_equal


def test_all_sums_are_additive_over_rows_but_the_balance_over_the_batch(rng):
    logits, kept, valid = some_tokens(rng, MIXTRAL)

    def sums(rows, balance_over):
        options = dataclasses.replace(MIXTRAL, balance_over=balance_over)
        return sums_of(logits[rows], kept[rows], valid[rows], options)

    for balance_over, is_additive in (("sequence", True), ("batch", False)):
        whole = sums(slice(None), balance_over)
        parts = [sums(slice(row, row + 1), balance_over) for row in range(B)]
        for field, one, *others in zip(RouterSums._fields, whole, *parts, strict=True):
            expected = is_additive or field != "balance"
            assert np.allclose(one, sum(others), rtol=1e-5) == expected, field


@pytest.mark.fast
def test_tokens_with_a_logit_that_is_not_finite_are_counted_unless_they_are_padding():
    logits = np.zeros((2, T, E), np.float32)
    logits[0, 1, 2], logits[0, 2, 3], logits[1, 4, :], logits[1, 5, 0] = np.nan, np.inf, np.nan, -np.inf
    valid = np.ones((2, T), bool)
    for is_valid, count in ((True, 4), (False, 1)):
        valid[0, 2] = valid[1] = is_valid
        assert sums_of(logits, None, valid, MIXTRAL).not_finite == count
    valid[0] = False
    valid[0, 0] = True
    sums = sums_of(logits, None, valid, MIXTRAL)
    assert all(np.all(np.isfinite(value)) for value in sums)


@pytest.mark.parametrize("balance_over", ["sequence", "batch"])
def test_sums_over_devices_are_those_of_the_whole_batch(mesh_2x2x2, rng, balance_over):
    options = dataclasses.replace(MIXTRAL, balance_over=balance_over)
    logits, kept, valid = some_tokens(rng, options, rows=8)

    def loss(logits, kept, valid, sums):
        found = sums(logits, kept, valid)
        return 2 * found.balance + 3 * found.z, found

    def on_devices(logits, kept, valid):
        local = lambda *inputs: sums_of(*inputs, options, batch_axes=BATCH)  # noqa: E731
        sharded = jax.shard_map(local, in_specs=(P(BATCH),) * 3, out_specs=P())
        return jax.grad(loss, has_aux=True)(logits, kept, valid, sharded)

    alone = jax.grad(loss, has_aux=True)(logits, kept, valid, lambda *inputs: sums_of(*inputs, options))
    found = run_on(mesh_2x2x2, on_devices, *((array, P(BATCH)) for array in (logits, kept, valid)))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert np.abs(alone[0]).max() > 1e-1
    np.testing.assert_array_equal(alone[1].load.sum(), K * valid.sum())
