import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.nn.norm import Norm
from lmjax.sharding import activation_spec
from tests.nn.modules import as_function, on_mesh
from tests.tiny import mesh_of

WIDTH, EPSILON = 8, 1e-2


@dataclasses.dataclass(frozen=True)
class Numbers:
    x: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    dy: np.ndarray


@pytest.fixture
def numbers(rng) -> Numbers:
    x, dy = 1 + rng.standard_normal((2, 3, 5, WIDTH)).astype(np.float32)
    scale, bias = rng.standard_normal((2, WIDTH)).astype(np.float32)
    return Numbers(x, scale, bias, dy)


def with_values(norm: Norm, scale: np.ndarray, bias: np.ndarray | None = None) -> Norm:
    norm.scale[...] = scale
    if bias is not None:
        assert norm.bias is not None
        norm.bias[...] = bias
    return norm


def theirs(module, numbers: Numbers, names: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Value and gradients (of x, and of each named parameter) of a torch module."""
    torch = pytest.importorskip("torch")
    module.load_state_dict({name: torch.tensor(value) for name, value in names.items()})
    x = torch.tensor(numbers.x, requires_grad=True)
    y = module(x)
    y.backward(torch.tensor(numbers.dy))
    parameters = dict(module.named_parameters())
    return [y.detach().numpy(), x.grad.numpy(), *(parameters[name].grad.numpy() for name in names)]


def ours(norm: Norm, numbers: Numbers) -> list[np.ndarray]:
    """The same of one of our norms; the gradient of its scale, then that of its bias."""
    make, parameters = as_function(norm)
    y, pull_back = jax.vjp(lambda parameters, x: make(parameters)(x), parameters, jnp.asarray(numbers.x))
    gradients, dx = pull_back(jnp.asarray(numbers.dy))
    return [np.asarray(array) for array in (y, dx, *(gradients[name] for name in sorted(gradients, reverse=True)))]


def assert_all_close(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)


@pytest.mark.fast
def test_rms_norm_is_torchs(numbers):
    torch = pytest.importorskip("torch")
    norm = with_values(Norm("rms", (WIDTH,), EPSILON), numbers.scale)
    found = ours(norm, numbers)
    assert_all_close(found, theirs(torch.nn.RMSNorm(WIDTH, eps=EPSILON), numbers, {"weight": numbers.scale}))
    with pytest.raises(AssertionError):
        assert_all_close(found, theirs(torch.nn.RMSNorm(WIDTH, eps=1e-5), numbers, {"weight": numbers.scale}))


@pytest.mark.fast
@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_norm_is_torchs(numbers, has_bias):
    torch = pytest.importorskip("torch")
    norm = with_values(Norm("layer", (WIDTH,), EPSILON, bias=has_bias), numbers.scale)
    assert (norm.bias is not None) == has_bias
    weights = {"weight": numbers.scale}
    if has_bias:
        norm = with_values(norm, numbers.scale, numbers.bias)
        weights["bias"] = numbers.bias
    found = ours(norm, numbers)
    assert_all_close(found, theirs(torch.nn.LayerNorm(WIDTH, EPSILON, bias=has_bias), numbers, weights))
    without_mean = with_values(Norm("rms", (WIDTH,), EPSILON), numbers.scale)
    with pytest.raises(AssertionError):
        assert_all_close(ours(without_mean, numbers)[:2], found[:2])


def test_a_unit_offset_is_gemmas(numbers):
    modeling = pytest.importorskip("transformers.models.gemma.modeling_gemma")
    norm = Norm("rms", (WIDTH,), EPSILON, unit_offset=True)
    assert not np.any(norm.scale[...])
    found = ours(with_values(norm, numbers.scale), numbers)
    assert_all_close(found, theirs(modeling.GemmaRMSNorm(WIDTH, EPSILON), numbers, {"weight": numbers.scale}))
    plain = ours(with_values(Norm("rms", (WIDTH,), EPSILON), numbers.scale), numbers)
    with pytest.raises(AssertionError):
        assert_all_close(plain[:1], found[:1])


@pytest.mark.fast
@pytest.mark.parametrize(("kind", "unit_offset"), [("rms", False), ("rms", True), ("layer", False)])
def test_at_first_a_norm_only_norms(numbers, kind, unit_offset):
    y = np.asarray(Norm(kind, (WIDTH,), 1e-12, unit_offset=unit_offset, bias=kind == "layer")(jnp.asarray(numbers.x)))
    np.testing.assert_allclose((y * y).mean(-1), 1, rtol=1e-5)
    if kind == "layer":
        np.testing.assert_allclose(y.mean(-1), 0, atol=1e-6)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("axis", "heads"), [("heads", 4), ("kv_heads", 3)], ids=["split", "whole-on-every-device"])
def test_heads_that_are_sharded_are_normed_together(rng, kind, axis, heads):
    """Over (heads, head_dim) on eight devices, against the same numbers as one vector in float64."""
    mesh, head_dim = mesh_of(2, 2, 2), 4
    x = (0.5 + rng.standard_normal((4, 3, heads, head_dim))).astype(np.float32)
    scale = rng.standard_normal((heads, head_dim)).astype(np.float32)
    norm = with_values(Norm(kind, (heads, head_dim), EPSILON, axes=(axis, "head_dim")), scale)
    assert on_mesh(norm, mesh).scale[...].sharding.spec == jax.P("tensor" if heads == 4 else None, None)
    with jax.set_mesh(mesh):
        spec = activation_spec(("batch", "seq", axis, "head_dim"), x.shape)
        placed = jax.device_put(x, jax.NamedSharding(mesh, spec))
        found = jax.jit(lambda norm, x: norm(x))(on_mesh(norm, mesh), placed)
    assert found.sharding.spec == placed.sharding.spec
    flat = x.astype(np.float64).reshape(4, 3, -1)
    flat = flat - flat.mean(-1, keepdims=True) if kind == "layer" else flat
    expected = (flat / np.sqrt((flat * flat).mean(-1, keepdims=True) + EPSILON) * scale.reshape(-1)).reshape(x.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    apart = x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * scale
    assert np.abs(apart - expected).max() > 1e-2


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_bfloat16_is_normed_in_float32(rng, kind):
    """Values whose squares' mean needs more than 8 bits: the result is the exact one, rounded once."""
    x = jnp.asarray(rng.standard_normal((4, 512)), jnp.bfloat16)
    found = Norm(kind, (512,), 1e-5)(x)
    assert found.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    exact = exact - exact.mean(-1, keepdims=True) if kind == "layer" else exact
    exact = exact / np.sqrt((exact * exact).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=2**-8, atol=1e-6)
