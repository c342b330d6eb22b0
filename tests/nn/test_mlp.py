import jax
import numpy as np
import pytest

from lmjax.nn.mlp import GatedMLP
from tests.tiny import FLOAT32, by_rows, mesh_of

pytestmark = pytest.mark.fast


def test_gated_mlp_is_its_formula(rng):
    mesh = mesh_of(1, 1, 1)
    mlp = GatedMLP(6, 10, output_std=0.3, key=jax.random.key(1))
    x = rng.standard_normal((2, 3, 6)).astype(np.float32)
    gate, up, down = (np.asarray(layer.kernel[...], np.float64) for layer in (mlp.gate, mlp.up, mlp.down))
    assert down.std() > 5 * up.std()
    with jax.set_mesh(mesh):
        found = jax.jit(lambda mlp, x: mlp(x, FLOAT32))(mlp, *by_rows(mesh, x))
    gated = x @ gate
    np.testing.assert_allclose(found, (gated / (1 + np.exp(-gated)) * (x @ up)) @ down, rtol=1e-4, atol=1e-8)
