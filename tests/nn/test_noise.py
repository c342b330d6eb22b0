import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmjax.nn.noise import Noise
from tests.tiny import mesh_of

ROWS, LENGTH, EMBED, RATE = 8, 16, 32, 0.3
RESIDUAL = P(("data", "fsdp", "expert"), "tensor", None)


def keys_of(seed: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(ROWS))


def dropped(x: np.ndarray, mesh=None, *, seed: int = 0, place: int = 0, rows: slice = slice(None)) -> np.ndarray:
    """``x`` (of these rows) as the residual stream of ``mesh`` with a part zeroed."""
    mesh = mesh_of(1, 1, 1) if mesh is None else mesh
    keys = jax.random.key_data(keys_of(seed))[rows]
    with jax.set_mesh(mesh):
        placed = jax.device_put(x[rows], jax.NamedSharding(mesh, RESIDUAL))
        by_row = jax.device_put(keys, jax.NamedSharding(mesh, P(("data", "fsdp", "expert"))))

        @jax.jit
        def run(x, keys, place):
            return Noise(jax.random.wrap_key_data(keys), RATE).dropout(x, place)

        found = run(placed, by_row, jnp.asarray(place))
    assert found.sharding.spec == RESIDUAL
    return np.asarray(found)


@pytest.fixture
def x(rng) -> np.ndarray:
    return 1 + rng.random((ROWS, LENGTH, EMBED)).astype(np.float32)


def test_a_part_is_zeroed_and_the_rest_scaled(x):
    found = dropped(x)
    kept = found != 0
    assert kept.mean() == pytest.approx(1 - RATE, abs=4 * (RATE * (1 - RATE) / x.size) ** 0.5)
    for axis in range(3):  # no row, position or dimension has a pattern of its own
        others = tuple(i for i in range(3) if i != axis)
        deviation = (RATE * (1 - RATE) * x.shape[axis] / x.size) ** 0.5
        assert np.abs(kept.mean(axis=others) - (1 - RATE)).max() < 4.5 * deviation
    np.testing.assert_allclose(found, np.where(kept, x / (1 - RATE), 0), rtol=1e-6)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 8)])
def test_what_is_zeroed_does_not_depend_on_the_mesh(x, sizes):
    np.testing.assert_array_equal(dropped(x, mesh_of(*sizes)), dropped(x))


def test_what_is_zeroed_in_a_row_does_not_depend_on_the_rows_beside_it(x):
    whole = dropped(x)
    np.testing.assert_array_equal(dropped(x, rows=slice(1, None, 2)), whole[1::2])
    assert np.any(dropped(x, rows=slice(0, None, 2)) != whole[1::2])


def test_other_keys_places_and_rows_zero_something_else(x):
    kept = dropped(x) != 0
    chance = RATE**2 + (1 - RATE) ** 2  # that two patterns drawn apart agree somewhere
    for other in (dropped(x, seed=1), dropped(x, place=1), np.roll(dropped(np.ones_like(x)), 1, axis=0)):
        agreement = ((other != 0) == kept).mean()
        assert agreement == pytest.approx(chance, abs=4 * (chance * (1 - chance) / x.size) ** 0.5)


def test_the_gradient_passes_where_the_value_did(x):
    dropout = Noise(keys_of(0), RATE).dropout
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.NamedSharding(mesh, RESIDUAL))
        gradient = jax.grad(lambda x: jnp.sum(dropout(x, jnp.asarray(0))))(placed)
    np.testing.assert_allclose(gradient, np.where(dropped(x) != 0, 1 / (1 - RATE), 0), rtol=1e-6)


def test_bfloat16_stays_bfloat16(x):
    found = dropped(x.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found != 0, dropped(x) != 0)
