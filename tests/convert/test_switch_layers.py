"""Layers of Switch Transformers against transformers' own class: values, gradients, what is dropped, and the files."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lmjax.convert.switch_layers import read_switch_layer, switch_layer_tensors
from lmjax.convert.tensors import open_tensors
from lmjax.errors import InputError
from lmjax.nn.moe import MoE, MoEConfig
from tests.nn.modules import as_function
from tests.nn.test_moe import ours, value_and_gradients
from tests.tiny import mesh_of

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

B, T, D, F, E = 3, 12, 8, 16, 4
NAME = "decoder.block.1.layer.2.mlp"


@pytest.fixture
def theirs(rng) -> Any:
    """Everything random; slots for two tokens of a sequence in each expert."""
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    config = transformers.SwitchTransformersConfig(
        d_model=D, d_ff=F, num_experts=E, expert_capacity=2, dropout_rate=0.0, router_jitter_noise=0.0
    )
    layer = SwitchTransformersSparseMLP(config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.from_numpy(rng.standard_normal(parameter.shape).astype(np.float32)))
    return layer


@pytest.fixture
def files(theirs, tmp_path: Path) -> Path:
    tensors = {f"{NAME}.{name}": tensor.numpy().copy() for name, tensor in theirs.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("slots", [2, T])
def test_a_layer_computes_and_learns_what_it_does_there(theirs, files: Path, rng, slots: int):
    theirs.router.expert_capacity = slots
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    config = MoEConfig(num_experts=E, experts_per_token=1, renormalize=False, capacity_factor=slots * E / T)
    moe = MoE(config, D, F, activation="relu", gated=False, output_std=0.1, key=jax.random.key(0))
    build, parameters = as_function(moe)
    params = read_switch_layer(open_tensors(files), NAME)
    assert params.keys() == {f"{module}/{leaf}" for module, leaves in parameters.items() for leaf in leaves}
    moe = build({path.split("/")[0]: {path.split("/")[1]: jnp.asarray(value)} for path, value in params.items()})
    valid = np.ones((B, T), bool)
    (y, [sums]), (tree, x_gradient) = value_and_gradients(ours, moe, mesh_of(1, 1, 1), x, valid)
    gradients = {f"{module}/{leaf}": value for module, leaves in tree.items() for leaf, value in leaves.items()}

    x_there = torch.from_numpy(x).requires_grad_()
    y_there = theirs(x_there)
    (y_there * torch.arange(y.size).reshape(y.shape) / y.size).sum().backward()
    np.testing.assert_allclose(y, y_there.detach(), atol=2e-5)
    np.testing.assert_allclose(x_gradient, x_there.grad, atol=2e-5)
    found = switch_layer_tensors(gradients, NAME)
    for name, parameter in theirs.named_parameters():
        expected = parameter.grad
        np.testing.assert_allclose(
            found[f"{NAME}.{name}"], expected, atol=2e-5 * max(1, expected.abs().max()), err_msg=name
        )
    is_dropped = np.all(np.asarray(y) == 0, axis=-1)
    assert np.sum(is_dropped) == np.sum(sums.dropped)
    assert np.any(is_dropped) == (slots == 2)


def test_a_layer_comes_back_bit_by_bit(files: Path):
    before = load_file(files / "model.safetensors")
    after = switch_layer_tensors(read_switch_layer(open_tensors(files), NAME), NAME)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (lambda tensors: None, "decoder.block.3.layer.2.mlp", rf"these files have {NAME}"),
        (lambda tensors: tensors.pop(f"{NAME}.experts.expert_2.wo.weight"), NAME, r"expert_2\.wo\.weight: missing"),
        (
            lambda tensors: tensors.update({f"{NAME}.router.classifier.bias": np.zeros(E, np.float32)}),
            NAME,
            "routers here have no bias",
        ),
    ],
)
def test_what_is_no_such_layer_is_refused(files: Path, change, name: str, message: str):
    tensors = load_file(files / "model.safetensors")
    change(tensors)
    save_file(tensors, files / "model.safetensors")
    with pytest.raises(InputError, match=message):
        read_switch_layer(open_tensors(files), name)
