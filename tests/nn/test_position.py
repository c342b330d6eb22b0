import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.nn.position import rotate

pytestmark = pytest.mark.fast

THETA = 100.0


def turned(x: np.ndarray, position: int) -> np.ndarray:
    """One head rotated by hand: the pair (i, i + half) by position / theta^(2i / head_dim)."""
    half = len(x) // 2
    y = np.empty_like(x)
    for i in range(half):
        angle = position / THETA ** (2 * i / len(x))
        pair = x[i] + 1j * x[i + half]
        pair *= np.exp(1j * angle)
        y[i], y[i + half] = pair.real, pair.imag
    return y


def test_rotation_is_its_formula(rng):
    x = rng.standard_normal((2, 3, 2, 6)).astype(np.float32)
    positions = np.array([[0, 1, 7], [3, 0, 1]], np.int32)
    found = np.asarray(rotate(jnp.asarray(x), positions, THETA))
    for b, t, n in np.ndindex(2, 3, 2):
        np.testing.assert_allclose(found[b, t, n], turned(x[b, t, n], positions[b, t]), atol=1e-5)
    assert np.abs(found[0, 1, 0] - turned(x[0, 1, 0], 2)).max() > 1e-2


def test_scores_depend_on_the_distance_alone(rng):
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(query_position: int, key_position: int) -> float:
        rotated = (rotate(x, np.array([[p]]), THETA) for x, p in ((q, query_position), (k, key_position)))
        return float(jnp.sum(next(rotated) * next(rotated)))

    assert score(9, 4) == pytest.approx(score(5, 0), rel=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_angles_are_computed_in_float32():
    """In bfloat16, position 1001 would be 1000."""
    x = jnp.ones((1, 2, 1, 2), jnp.bfloat16)
    found = np.asarray(rotate(x, np.array([[1000, 1001]]), THETA), np.float32)[0, :, 0, 0]
    np.testing.assert_allclose(found, np.cos([1000, 1001]) - np.sin([1000, 1001]), atol=2**-7)
