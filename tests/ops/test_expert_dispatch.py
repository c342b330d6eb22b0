"""Which row each choice gets is what a plain simulation says, and experts reached that way are experts reached at all.

Legend: B batch, T positions, K choices of a token, E experts, C capacity, N tokens, M rows, D embed, F outputs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.ops.expert_dispatch import (
    Dispatch,
    capacity_of,
    dropless,
    from_experts,
    take_rows,
    to_experts,
    with_capacity,
)
from lmjax.ops.grouped_matmul import grouped_matmul
from tests.ops.expert_dispatch_reference import dense_experts, one_hot_experts, one_hot_slots
from tests.ops.sharded import assert_trees_close, count, equations, shapes

B, T, K, E, D, F = 2, 11, 2, 7, 3, 5
SMALL = 2
"""A capacity that some choices exceed, where T is one that none can."""

sorted_rows = jax.jit(dropless, static_argnums=2)
slots = jax.jit(with_capacity, static_argnums=(2, 3))


def choices(rng: np.random.Generator, skew: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """(B, T, K) different experts of each token, those with low numbers oftener with ``skew``; and (B, T) whether a
    token is valid: the first four, and most of some more."""
    preference = rng.random((B, T, E)) - skew * np.arange(E) / E
    experts = np.argsort(-preference, axis=-1)[..., :K].astype(np.int32)
    valid = (np.arange(T) < rng.integers(T // 2, T + 1, (B, 1))) & (rng.random((B, T)) < 0.9)
    valid[:, :4] = True
    return experts, valid


def arrays(rng: np.random.Generator) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x (B, T, D), weights (B, T, K) and w (E, D, F)."""
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return draw(B, T, D), draw(B, T, K), draw(E, D, F)


def simulated_rows(experts: np.ndarray, valid: np.ndarray, capacity: int) -> dict[tuple[int, int, int], int]:
    """The row of each choice (sequence, token, choice) that is not dropped, one after the other as GShard does."""
    rows, taken = {}, np.zeros((E, B), int)
    for sequence in range(B):
        for choice in range(K):
            for token in range(T):
                expert = experts[sequence, token, choice]
                if valid[sequence, token]:
                    if taken[expert, sequence] < capacity:
                        rows[sequence, token, choice] = (expert * B + sequence) * capacity + taken[expert, sequence]
                    taken[expert, sequence] += 1
    return rows


def assert_rows(dispatch: Dispatch, rows: dict[tuple[int, int, int], int], num_rows: int) -> None:
    """The dispatch gives every choice its row, every row its choice, and marks the others as none."""
    expected_rows = np.full((B, T, K), num_rows)
    expected_choices = np.full(num_rows, B * T * K)
    for (sequence, token, choice), row in rows.items():
        expected_rows[sequence, token, choice] = row
        expected_choices[row] = (sequence * T + token) * K + choice
    np.testing.assert_array_equal(dispatch.row_of_choice, expected_rows.reshape(-1, K))
    np.testing.assert_array_equal(dispatch.choice_of_row, expected_choices)
    if dispatch.kept is not None:
        np.testing.assert_array_equal(dispatch.kept, expected_rows < num_rows)


def moe(x_BTD, weights_BTK, w_EDF, dispatch: Dispatch):
    """The sum over each token's choices of weight x tanh(x @ w), by way of rows."""
    rows_MD = to_experts(x_BTD.reshape(B * T, -1), dispatch)
    results_MF = jnp.tanh(grouped_matmul(rows_MD, w_EDF, dispatch.sizes, "cpu"))
    return from_experts(results_MF, weights_BTK.reshape(-1, K), dispatch).reshape(B, T, -1)


def values_and_gradients(function, inputs, weights_BTF):
    value, pull_back = jax.vjp(function, *inputs)
    return value, pull_back(weights_BTF)


@pytest.mark.parametrize("skew", [0.0, 2.0], ids=["even", "crowded"])
def test_with_capacity_drops_exactly_the_choices_that_a_simulation_drops(rng, skew):
    num_dropped = 0
    for capacity in (1, 3):
        for _ in range(60):
            experts, valid = choices(rng, skew)
            rows = simulated_rows(experts, valid, capacity)
            found = slots(experts, valid, E, capacity)
            assert_rows(found, rows, E * B * capacity)
            np.testing.assert_array_equal(found.sizes, np.full(E, B * capacity))
            num_dropped += K * int(valid.sum()) - len(rows)
    assert num_dropped > 100
    with pytest.raises(AssertionError):
        assert_rows(found, simulated_rows(experts, ~valid, capacity), E * B * capacity)


@pytest.mark.fast
def test_first_choices_come_before_second_ones_and_earlier_tokens_before_later_ones():
    experts = np.array([[[1, 0], [0, 1], [2, 0], [0, 2]], [[0, 1], [0, 1], [0, 1], [2, 0]]], np.int32)
    valid = np.array([[True, True, True, True], [False, True, True, True]])
    kept = slots(experts, valid, 3, 2).kept
    expected = [
        [[True, False], [True, True], [True, False], [True, True]],
        [[False, False], [True, True], [True, True], [True, False]],
    ]
    np.testing.assert_array_equal(kept, expected)


def test_dropless_sorts_all_choices_of_valid_tokens_by_expert_and_then_by_token(rng):
    for _ in range(60):
        experts, valid = choices(rng)
        places = [place for place in np.ndindex(B, T, K) if valid[place[:2]]]
        in_order = sorted(places, key=lambda place: (experts[place], place))
        found = sorted_rows(experts, valid, E)
        assert_rows(found, {place: row for row, place in enumerate(in_order)}, B * T * K)
        np.testing.assert_array_equal(found.sizes, np.bincount([experts[place] for place in places], minlength=E))
        assert found.kept is None
        assert found.sizes.sum() == K * valid.sum()
    assert not np.all(np.diff(found.choice_of_row) > 0)


@pytest.mark.fast
@pytest.mark.parametrize("is_valid", [True, False], ids=["one-expert-takes-all", "no-token-is-valid"])
def test_the_ends_of_what_can_be_routed(is_valid):
    experts = np.full((B, T, 1), E - 1, np.int32)
    valid = np.full((B, T), is_valid)
    sizes = np.zeros(E, int)
    sizes[-1] = B * T * is_valid
    np.testing.assert_array_equal(sorted_rows(experts, valid, E).sizes, sizes)
    assert slots(experts, valid, E, SMALL).kept.sum() == B * SMALL * is_valid


@pytest.mark.fast
@pytest.mark.parametrize(
    ("length", "num_experts", "experts_per_token", "factor", "capacity"),
    [
        (16, 8, 1, 1.0, 2),
        (16, 8, 2, 1.0, 4),
        (16, 8, 1, 1.25, 3),
        (100, 10, 1, 1.1, 11),  # in floating point, 1.1 x 100 is more than 110
        (4, 64, 1, 1.0, 1),
        (16, 4, 2, 8.0, 16),
    ],
)
def test_capacity_is_the_even_share_rounded_up_and_at_most_the_sequence(
    length, num_experts, experts_per_token, factor, capacity
):
    assert capacity_of(length, num_experts, experts_per_token, factor) == capacity


@pytest.mark.parametrize("capacity", [None, SMALL, T], ids=["dropless", "some-dropped", "capacity"])
def test_with_experts_that_do_nothing_a_token_comes_back_times_its_kept_weights(rng, capacity):
    experts, valid = choices(rng, skew=2.0)
    x, weights, _ = arrays(rng)
    if capacity is None:
        dispatch, kept = sorted_rows(experts, valid, E), np.broadcast_to(valid[..., None], experts.shape)
    else:
        dispatch = slots(experts, valid, E, capacity)
        kept = np.asarray(dispatch.kept)
    there_and_back = jax.jit(lambda x, weights: from_experts(to_experts(x, dispatch), weights, dispatch))
    found = there_and_back(x.reshape(-1, D), weights.reshape(-1, K)).reshape(x.shape)
    np.testing.assert_allclose(found, x * np.sum(weights * kept, axis=-1, keepdims=True), atol=1e-6)
    assert np.any(np.asarray(found)[valid] != 0)
    assert not np.any(np.asarray(found)[~valid])
    assert np.all(kept == valid[..., None]) == (capacity != SMALL)


@pytest.mark.parametrize("capacity", [SMALL, T], ids=["some-dropped", "enough"])
def test_capacity_equals_products_with_one_hot_tensors(rng, capacity):
    experts, valid = choices(rng, skew=1.0)
    inputs, dy = arrays(rng), rng.normal(size=(B, T, F)).astype(np.float32)
    one_hot = one_hot_slots(experts, valid, E, capacity)

    @jax.jit
    def found(*inputs):
        dispatch = with_capacity(experts, valid, E, capacity)
        return values_and_gradients(lambda *inputs: moe(*inputs, dispatch), inputs, dy)

    reference = jax.jit(lambda *inputs: values_and_gradients(lambda *x: one_hot_experts(*x, one_hot), inputs, dy))
    expected = reference(*inputs)
    assert_trees_close(found(*inputs), expected, 1e-6)
    others = one_hot_slots(np.roll(experts, 1, axis=1), valid, E, capacity)
    with pytest.raises(AssertionError):
        assert_trees_close(found(*inputs)[0], one_hot_experts(*inputs, others), 1e-2)


@pytest.mark.parametrize("capacity", [None, T], ids=["dropless", "capacity"])
def test_dispatch_equals_a_dense_loop_over_experts(rng, capacity):
    experts, valid = choices(rng, skew=1.0)
    inputs, dy = arrays(rng), rng.normal(size=(B, T, F)).astype(np.float32)

    @jax.jit
    def found(experts, valid, *inputs):
        dispatch = dropless(experts, valid, E) if capacity is None else with_capacity(experts, valid, E, capacity)
        return values_and_gradients(lambda *inputs: moe(*inputs, dispatch), inputs, dy)

    reference = jax.jit(lambda *inputs: values_and_gradients(lambda *x: dense_experts(*x, experts, valid), inputs, dy))
    expected = reference(*inputs)
    assert_trees_close(found(experts, valid, *inputs), expected, 1e-6)
    with pytest.raises(AssertionError):
        assert_trees_close(found(np.roll(experts, 1, axis=1), valid, *inputs), expected, 1e-2)


@pytest.mark.parametrize("capacity", [None, SMALL], ids=["dropless", "capacity"])
def test_gradients_are_those_of_plain_indexing_and_add_no_floats_row_by_row(rng, capacity):
    """A scatter-add of rows is what JAX makes of the gradient of a gather: slow, and in no fixed order on a GPU."""
    experts, valid = choices(rng, skew=1.0)
    x, weights, _ = arrays(rng)
    dispatch = sorted_rows(experts, valid, E) if capacity is None else slots(experts, valid, E, capacity)

    def ours(x_ND, weights_NK):
        return from_experts(jnp.sin(to_experts(x_ND, dispatch)), weights_NK, dispatch)

    def plain(x_ND, weights_NK):
        rows_MD = jnp.sin(x_ND.at[dispatch.choice_of_row // K].get(mode="fill", fill_value=0))
        return jnp.sum(
            rows_MD.at[dispatch.row_of_choice].get(mode="fill", fill_value=0) * weights_NK[..., None], axis=1
        )

    inputs = x.reshape(-1, D), weights.reshape(-1, K)
    gradients = [jax.grad(lambda *inputs, way=way: jnp.sum(way(*inputs) ** 2), (0, 1)) for way in (ours, plain)]
    assert_trees_close(*(jax.jit(gradient)(*inputs) for gradient in gradients), 1e-6)
    num_added = [
        sum(
            equation.primitive.name == "scatter-add" and jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating)
            for equation in equations(jax.make_jaxpr(gradient)(*inputs))
        )
        for gradient in gradients
    ]
    assert num_added == [0, 2]


def test_no_temporary_of_the_dropless_form_grows_with_experts_times_tokens(rng):
    """All sizes are prime, so that such a product is recognised."""
    num_tokens, num_experts = 13, 7
    x = jnp.ones((1, num_tokens, D))
    weights, w = jnp.ones((1, num_tokens, K)), jnp.ones((num_experts, D, F))
    experts, valid = jnp.zeros((1, num_tokens, K), jnp.int32), jnp.ones((1, num_tokens), bool)

    def ours(x, weights, w, experts, valid):
        dispatch = dropless(experts, valid, num_experts)
        results = grouped_matmul(to_experts(x[0], dispatch), w, dispatch.sizes, "cpu")
        return jnp.sum(from_experts(results, weights[0], dispatch) ** 2)

    def by_one_hot(x, weights, w, experts, valid):
        return jnp.sum(one_hot_experts(x, weights, w, one_hot_slots(experts, valid, num_experts, num_tokens)) ** 2)

    def num_large(function) -> int:
        jaxpr = jax.make_jaxpr(jax.grad(function, (0, 1, 2)))(x, weights, w, experts, valid)
        return sum(math.prod(shape) % (num_tokens * num_experts) == 0 for shape in shapes(jaxpr) if 0 not in shape)

    assert num_large(ours) == 0
    assert num_large(by_one_hot) > 5


@pytest.mark.fast
def test_choices_are_summed_in_float32_forward_and_backward():
    """In bfloat16 256 + 1 is 256, so a sum of small numbers after a large one stands still."""
    num_choices = 9
    x, index = jnp.ones((1, 1), jnp.bfloat16), jnp.zeros(num_choices, jnp.int32)
    inverse = jnp.arange(num_choices)[None]
    dispatch = Dispatch(inverse, jnp.arange(num_choices), jnp.array([num_choices]), None)
    rows = jnp.array([256, *[1] * (num_choices - 1)], jnp.bfloat16)[:, None]
    _, pull_back = jax.vjp(lambda x: take_rows(x, index, inverse), x)
    gathered = jax.jit(from_experts)(rows, jnp.ones((1, num_choices)), dispatch)
    assert gathered.dtype == rows.dtype
    assert gathered[0, 0] == 264
    dx = pull_back(rows)[0]
    assert dx.dtype == rows.dtype
    assert dx[0, 0] == 264
    in_bfloat16 = rows[0, 0]
    for row in rows[1:, 0]:
        in_bfloat16 += row
    assert in_bfloat16 == 256


@pytest.mark.fast
def test_rows_of_no_choice_and_choices_of_no_row_are_zeros_forward_and_backward(rng):
    experts, _ = choices(rng)
    valid = np.zeros((B, T), bool)
    valid[0, :3] = True
    x = jnp.full((B * T, D), jnp.nan).at[:3].set(1.0)
    dispatch = sorted_rows(experts, valid, E)
    rows, pull_back = jax.vjp(lambda x: to_experts(x, dispatch), x)
    np.testing.assert_array_equal(rows, np.repeat([1.0, 0.0], [3 * K, (B * T - 3) * K])[:, None] * np.ones(D))
    dx = pull_back(jnp.full(rows.shape, jnp.nan).at[: 3 * K].set(1.0))[0]
    np.testing.assert_array_equal(dx, np.repeat([float(K), 0.0], [3, B * T - 3])[:, None] * np.ones(D))
    assert count(jax.make_jaxpr(lambda x: to_experts(x, dispatch))(x), "gather") == 1
