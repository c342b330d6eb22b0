import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.nn.param import Projection, constant, matrix, residual_std
from lmjax.sharding import activation_spec
from tests.nn.modules import on_mesh
from tests.tiny import FLOAT32, mesh_of, with_parameter


@pytest.mark.fast
def test_residual_projections_are_drawn_smaller_by_their_number():
    assert residual_std("gpt2", 8) == pytest.approx(0.02 / 4)
    assert residual_std("olmo2", 8) == 0.02


@pytest.mark.fast
def test_a_matrix_is_normal_and_keeps_its_axes():
    parameter = matrix(jax.random.key(0), (64, 200), ("embed", "mlp"), std=0.5)
    values = np.asarray(parameter[...])
    assert values.dtype == np.float32
    assert parameter.axes == ("embed", "mlp")
    assert values.std() == pytest.approx(0.5, rel=0.03)
    assert abs(values.mean()) < 0.02


@pytest.mark.fast
def test_a_constant_is_its_value_everywhere():
    parameter = constant(-1.5, (3, 5), ("heads", "head_dim"))
    assert parameter.axes == ("heads", "head_dim")
    assert parameter[...].dtype == jnp.float32
    np.testing.assert_array_equal(parameter[...], np.full((3, 5), -1.5))


@pytest.mark.fast
def test_matrices_are_normally_distributed():
    """Moments, and the part within each deviation, of a hundred thousand numbers."""
    values = np.asarray(matrix(jax.random.key(1), (100, 1000), ("embed", "mlp"), std=1.0)[...])
    moments = [(values**power).mean() for power in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.06)
    for deviations, share in ((1, 0.6827), (2, 0.9545), (3, 0.9973)):
        assert (np.abs(values) < deviations).mean() == pytest.approx(share, abs=0.006)
    one_key_apart = np.asarray(matrix(jax.random.key(2), (100, 1000), ("embed", "mlp"), std=1.0)[...])
    assert abs((values * one_key_apart).mean()) < 0.02


@pytest.mark.fast
def test_axes_name_every_dimension():
    with pytest.raises(AssertionError):
        matrix(jax.random.key(0), (2, 3, 4), ("embed", "mlp"))
    with pytest.raises(AssertionError):
        constant(0.0, (2, 3), ("embed",))


@pytest.mark.parametrize(
    ("equation", "kernel", "axes", "output_axes", "bias_axes", "bias_shape"),
    [
        (
            "btd,dnh->btnh",
            (8, 4, 2),
            ("embed", "heads", "head_dim"),
            ("batch", "seq", "heads", "head_dim"),
            ("heads", "head_dim"),
            (4, 2),
        ),
        ("btd,df->btf", (8, 6), ("embed", "mlp"), ("batch", "seq", "mlp"), ("mlp",), (6,)),
        ("btf,fd->btd", (8, 6), ("mlp", "embed"), ("batch", "seq_residual", "embed"), ("norm",), (6,)),
    ],
    ids=["into-heads", "into-hidden", "into-residual-stream"],
)
def test_a_bias_is_zero_at_first_and_added_on_every_device(
    rng, equation, kernel, axes, output_axes, bias_axes, bias_shape
):
    options = {"bias_axes": bias_axes, "std": 0.5, "key": jax.random.key(3)}
    projection = Projection(equation, kernel, axes, output_axes, **options)
    assert projection.bias is not None
    assert projection.bias.axes == bias_axes
    assert projection.bias.shape == bias_shape
    assert not np.any(projection.bias[...])
    matrix_alone, bias = np.asarray(projection.kernel[...]), rng.standard_normal(bias_shape).astype(np.float32)
    mesh = mesh_of(2, 2, 2)
    x = rng.standard_normal((4, 2, 8)).astype(np.float32)
    with_parameter(projection, "bias", bias)
    with jax.set_mesh(mesh):
        input_axes = ("batch", "seq", "mlp" if axes[0] == "mlp" else "embed")
        placed = jax.device_put(x, jax.NamedSharding(mesh, activation_spec(input_axes, x.shape)))
        found = jax.jit(lambda projection, x: projection(x, FLOAT32))(on_mesh(projection, mesh), placed)
        spec = activation_spec(output_axes, found.shape)
    assert found.sharding.spec == spec
    product = np.tensordot(x.astype(np.float64), matrix_alone.astype(np.float64), 1)
    np.testing.assert_allclose(found, product + bias, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(found) - product).max() > 0.1
    assert Projection(equation, kernel, axes, output_axes, key=jax.random.key(3)).bias is None
