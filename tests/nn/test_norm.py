import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.nn.norm import RMSNorm
from tests.tiny import with_parameter

pytestmark = pytest.mark.fast


def expected(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def test_rms_norm_is_its_formula(rng):
    x, scale = rng.standard_normal((3, 5, 8)).astype(np.float32), rng.standard_normal(8).astype(np.float32)
    norm = with_parameter(RMSNorm(8, 1e-2), "scale", scale)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected(x, scale, 1e-2), rtol=1e-5)
    assert np.abs(np.asarray(norm(jnp.asarray(x))) - expected(x, scale, 1e-5)).max() > 1e-3


def test_bfloat16_is_normed_in_float32(rng):
    """Values whose squares' mean needs more than 8 bits: the result is the exact one, rounded once."""
    x = jnp.asarray(rng.standard_normal((4, 512)), jnp.bfloat16)
    norm = RMSNorm(512, 1e-5)
    found = norm(x)
    assert found.dtype == jnp.bfloat16
    exact = expected(np.asarray(x, np.float32), np.ones(512), 1e-5)
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=2**-8)
