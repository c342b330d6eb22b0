import jax
import numpy as np
import pytest

from lmjax.nn.mlp import ACTIVATIONS, MLP
from tests.tiny import FLOAT32, by_rows, mesh_of

B, T, D, F = 2, 3, 6, 10


def make(activation: str, *, gated: bool, bias: bool) -> MLP:
    """Matrices large enough for the activation to bend what passes, and random biases."""
    mlp = MLP(D, F, activation=activation, gated=gated, bias=bias, output_std=0.3, key=jax.random.key(1))  # pyright: ignore[reportArgumentType]
    rng = np.random.default_rng(2)
    for layer in (mlp.gate, mlp.up):
        if layer is not None:
            layer.kernel[...] = layer.kernel[...] * 30
    for layer in (mlp.gate, mlp.up, mlp.down):
        if layer is not None and layer.bias is not None:
            layer.bias[...] = rng.standard_normal(layer.bias.shape).astype(np.float32)
    return mlp


def ours(mlp: MLP, x: np.ndarray) -> np.ndarray:
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        return np.asarray(jax.jit(lambda mlp, x: mlp(x, FLOAT32))(mlp, *by_rows(mesh, x)))


def theirs(mlp: MLP, x: np.ndarray, activation: str) -> np.ndarray:
    """With torch's linear layers and its activations, in float64."""
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional

    def linear(layer, x):
        weight = torch.tensor(np.asarray(layer.kernel[...], np.float64)).T
        bias = None if layer.bias is None else torch.tensor(np.asarray(layer.bias[...], np.float64))
        return functional.linear(x, weight, bias)

    activations = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "relu": functional.relu,
    }
    inputs = torch.tensor(x.astype(np.float64))
    up = linear(mlp.up, inputs)
    act = activations[activation]
    hidden = act(up) if mlp.gate is None else act(linear(mlp.gate, inputs)) * up
    return linear(mlp.down, hidden).numpy()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (False, True)])
def test_an_mlp_is_torchs(rng, activation, gated, bias):
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    mlp = make(activation, gated=gated, bias=bias)
    found = ours(mlp, x)
    np.testing.assert_allclose(found, theirs(mlp, x, activation), rtol=1e-5, atol=1e-6)
    for other in set(ACTIVATIONS) - {activation}:  # the two forms of gelu differ by less than 1e-3
        assert np.abs(found - theirs(mlp, x, other)).max() > 1e-5, other


@pytest.mark.fast
def test_the_activation_is_on_the_gate(rng):
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    mlp = make("silu", gated=True, bias=True)
    found = theirs(mlp, x, "silu")
    assert mlp.gate is not None
    mlp.gate, mlp.up = mlp.up, mlp.gate
    assert np.abs(found - theirs(mlp, x, "silu")).max() > 1e-2


@pytest.mark.fast
def test_biases_are_zero_at_first_and_have_the_axes_of_what_they_are_added_to():
    options = {"activation": "relu", "output_std": 0.3, "key": jax.random.key(1)}
    mlp = MLP(D, F, gated=True, bias=True, **options)
    for layer, axes in ((mlp.gate, ("mlp",)), (mlp.up, ("mlp",)), (mlp.down, ("norm",))):
        assert layer is not None
        assert layer.bias is not None
        assert layer.bias.axes == axes
        assert not np.any(layer.bias[...])
    assert mlp.down.bias is not None
    assert mlp.down.bias.shape == (D,)
    assert mlp.up.kernel[...].std() < 0.1 < mlp.down.kernel[...].std()
    plain = MLP(D, F, gated=False, bias=False, **options)
    assert plain.gate is None
    assert plain.up.bias is None
    assert plain.down.bias is None
