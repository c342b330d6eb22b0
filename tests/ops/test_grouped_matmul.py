"""Both implementations give a plain loop's values and gradients, for any sizes, on one device and on a mesh.

Legend: M rows, E groups, D inputs, F outputs, L layers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmjax.ops import grouped_matmul as module
from lmjax.ops.grouped_matmul import grouped_matmul
from tests.ops.sharded import BATCH, assert_trees_close, run_on

M, E, D, F = 19, 4, 5, 3
BLOCKS = (6, 4)
SIZES = {
    "no multiple of a block": (3, 7, 5, 4),
    "multiples of a block": (4, 8, 6, 1),
    "larger blocks and then smaller ones": (16, 1, 2, 0),
    "less than a block": (1, 2, 1, 3),
    "empty groups": (0, 9, 0, 10),
    "one group has all": (0, 0, 19, 0),
    "the first has all": (19, 0, 0, 0),
    "rows left over": (2, 0, 7, 1),
    "no rows": (0, 0, 0, 0),
}
PLATFORMS = {"blocks": "cpu", "ragged_dot": "tpu"}
"""One that takes each implementation."""


@pytest.fixture(params=PLATFORMS)
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of which the blocks are small, so that a few rows are several."""
    monkeypatch.setattr(module, "BLOCK_ROWS", BLOCKS)
    assert module.BY_PLATFORM.get(PLATFORMS[request.param], "blocks") == request.param
    return PLATFORMS[request.param]


def arrays(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x (M, D), w (E, D, F) and the cotangent (M, F)."""
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in ((M, D), (E, D, F), (M, F)))


def forward_and_backward(platform: str):
    """Jitted: the result, and the gradients of x and w."""

    @jax.jit
    def run(x, w, sizes, dy):
        y, pull_back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, platform), x, w)
        return y, *pull_back(dy)

    return run


def loop(x, w, sizes, dy) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same in float64, zeros in rows that are left over."""
    x, w, dy = (np.asarray(array, np.float64) for array in (x, w, dy))
    y, dx, dw = np.zeros((len(x), w.shape[2])), np.zeros(x.shape), np.zeros(w.shape)
    row = 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            y[row] = x[row] @ w[group]
            dx[row] = w[group] @ dy[row]
            dw[group] += np.outer(x[row], dy[row])
            row += 1
    return y, dx, dw


def assert_equal(found, x, w, sizes, dy, tolerance: float = 1e-6) -> None:
    """Values of rows in groups, and gradients of all."""
    is_in_group = np.arange(len(x))[:, None] < sum(sizes)
    y, dx, dw = found
    assert_trees_close((np.where(is_in_group, y, 0), dx, dw), loop(x, w, sizes, dy), tolerance)


def test_values_and_gradients_are_those_of_a_plain_loop(rng, platform):
    run = forward_and_backward(platform)
    x, w, dy = arrays(rng)
    for sizes in SIZES.values():
        found = run(x, w, np.array(sizes, np.int32), dy)
        assert_equal(found, x, w, sizes, dy)
    with pytest.raises(AssertionError):
        assert_equal(run(x, w, np.array([4, 7, 5, 3], np.int32), dy), x, w, (3, 7, 5, 4), dy, 1e-2)


@pytest.mark.parametrize("rows", [1, 3])
def test_fewer_rows_than_a_block(rng, platform, rows):
    x, w, dy = arrays(rng)
    x, dy, sizes = x[:rows], dy[:rows], (0, rows - 1, 1, 0)
    assert_equal(forward_and_backward(platform)(x, w, np.array(sizes, np.int32), dy), x, w, sizes, dy)


def test_what_rows_beyond_the_groups_hold_reaches_nothing(rng, platform):
    run = forward_and_backward(platform)
    x, w, dy = arrays(rng)
    sizes = SIZES["rows left over"]
    for array in (x, dy):
        array[sum(sizes) :] = np.nan
    found = run(x, w, np.array(sizes, np.int32), dy)
    assert_equal(found, x, w, sizes, dy)
    assert not np.any(found[1][sum(sizes) :])


def test_permuting_the_groups_permutes_their_rows_and_gradients_alone(rng, platform):
    run = forward_and_backward(platform)
    x, w, dy = arrays(rng)
    sizes, order = np.array(SIZES["no multiple of a block"], np.int32), np.array([2, 0, 3, 1])
    rows = np.concatenate([np.arange(M)[np.repeat(np.arange(E), sizes) == group] for group in order])
    y, dx, dw = run(x, w, sizes, dy)
    found = run(x[rows], w[order], sizes[order], dy[rows])
    assert_trees_close(found, (y[rows], dx[rows], dw[order]), 1e-6)
    with pytest.raises(AssertionError):
        assert_trees_close(found, (y, dx, dw), 1e-2)


def test_bfloat16_results_are_sums_in_float32_rounded_once(rng, platform):
    x, w, dy = (array.astype(jnp.bfloat16) for array in arrays(rng))
    sizes = SIZES["empty groups"]
    found = forward_and_backward(platform)(x, w, np.array(sizes, np.int32), dy)
    assert all(array.dtype == jnp.bfloat16 for array in found)
    for one, other in zip(found, loop(x, w, sizes, dy), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=2.0**-8, atol=1e-6)


def test_gradient_of_a_matrix_with_many_rows_is_summed_in_float32(platform):
    """A sum of ones in bfloat16 stops at 256."""
    ones = jnp.ones((512, 1), jnp.bfloat16)
    w, sizes = jnp.ones((2, 1, 1), jnp.bfloat16), jnp.array([512, 0])
    _, _, dw = forward_and_backward(platform)(ones, w, sizes, ones)
    np.testing.assert_array_equal(np.asarray(dw, np.float32).reshape(-1), [512, 0])


def dense(x_MD, w_EDF, group_M):
    """Each row times its matrix, by way of all of them."""
    return jnp.einsum("md,edf,me->mf", x_MD, w_EDF, jax.nn.one_hot(group_M, w_EDF.shape[0]))


def test_gradients_through_a_remat_scan_over_a_mesh_are_those_of_one_device(mesh_2x2x2, rng, platform):
    """Rows differ over data and fsdp, and so do sizes; matrices are split over tensor, and shared by all rows."""
    num_layers, rows, hidden, num_devices = 2, 6, 4, 4
    x, dy = rng.normal(size=(2, num_devices * rows, D)).astype(np.float32)
    up = rng.normal(size=(num_layers, E, D, hidden)).astype(np.float32)
    down = rng.normal(size=(num_layers, E, hidden, D)).astype(np.float32)
    sizes = np.array([[1, 2, 0, 3], [6, 0, 0, 0], [0, 5, 1, 0], [2, 1, 2, 1]], np.int32)
    groups = np.concatenate([np.repeat(np.arange(E), row) for row in sizes])

    def layers(x, up, down, one_layer):
        layer = jax.checkpoint(lambda x, matrices: (x + one_layer(x, *matrices), None))
        return jax.lax.scan(layer, x, (up, down))[0]

    def local(x, up, down, sizes):
        hidden = jnp.tanh(grouped_matmul(x, up, sizes[0], platform))
        return jax.lax.psum(grouped_matmul(hidden, down, sizes[0], platform), "tensor")

    def on_devices(x, up, down, sizes, dy):
        specs = (P(BATCH), P(None, None, "tensor"), P(None, "tensor"), P(BATCH))
        sharded = jax.shard_map(local, in_specs=specs, out_specs=P(BATCH))
        y, pull_back = jax.vjp(lambda *inputs: layers(*inputs, lambda *args: sharded(*args, sizes)), x, up, down)
        return y, *pull_back(dy)

    inputs = [(x, P(BATCH)), (up, P(None, None, None, "tensor")), (down, P(None, None, "tensor"))]
    found = run_on(mesh_2x2x2, on_devices, *inputs, (sizes, P(BATCH)), (dy, P(BATCH)))
    alone = lambda groups: lambda x, up, down: dense(jnp.tanh(dense(x, up, groups)), down, groups)  # noqa: E731
    y, pull_back = jax.vjp(lambda *inputs: layers(*inputs, alone(groups)), x, up, down)
    assert_trees_close(found, (y, *pull_back(dy)), 2e-6)
    others = layers(x, up, down, alone(np.roll(groups, 1)))
    with pytest.raises(AssertionError):
        assert_trees_close(found[0], others, 1e-2)
