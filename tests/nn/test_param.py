import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.nn.param import matrix, residual_std, scale

pytestmark = pytest.mark.fast


def test_residual_projections_are_drawn_smaller_by_their_number():
    assert residual_std("gpt2", 8) == pytest.approx(0.02 / 4)
    assert residual_std("olmo2", 8) == 0.02


def test_a_matrix_is_normal_and_keeps_its_axes():
    parameter = matrix(jax.random.key(0), (64, 200), ("embed", "mlp"), std=0.5)
    values = np.asarray(parameter[...])
    assert values.dtype == np.float32
    assert parameter.axes == ("embed", "mlp")
    assert values.std() == pytest.approx(0.5, rel=0.03)
    assert abs(values.mean()) < 0.02
    assert scale(5).axes == ("norm",)
    assert jnp.all(scale(5)[...] == 1)


def test_matrices_are_normally_distributed():
    """Moments, and the part within each deviation, of a hundred thousand numbers."""
    values = np.asarray(matrix(jax.random.key(1), (100, 1000), ("embed", "mlp"), std=1.0)[...])
    moments = [(values**power).mean() for power in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.06)
    for deviations, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert (np.abs(values) < deviations).mean() == pytest.approx(share, abs=0.006)
    one_key_apart = np.asarray(matrix(jax.random.key(2), (100, 1000), ("embed", "mlp"), std=1.0)[...])
    assert abs((values * one_key_apart).mean()) < 0.02


def test_axes_name_every_dimension():
    with pytest.raises(AssertionError):
        matrix(jax.random.key(0), (2, 3, 4), ("embed", "mlp"))
