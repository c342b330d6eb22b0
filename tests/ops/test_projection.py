import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmjax.ops.projection import project
from tests.ops.sharded import BATCH, assert_trees_close, run_on

IN_SPEC, OUT_SPEC = P(("fsdp", "expert"), "tensor"), P("tensor", None, ("fsdp", "expert"))
RESIDUAL, WHOLE = P(BATCH, "tensor", None), P(BATCH, None, None)


@pytest.mark.parametrize("reduce_f32", [False, True])
def test_into_the_heads_and_back_is_two_einsums(mesh, rng, reduce_f32):
    x, dy = rng.normal(size=(2, 8, 8, 16)).astype(np.float32)
    w_in = rng.normal(size=(16, 8, 4)).astype(np.float32)
    w_out = rng.normal(size=(8, 4, 16)).astype(np.float32)

    def there_and_back(x, w_in, w_out):
        heads = P(BATCH, None, "tensor", None)
        y = project("btd,dnh->btnh", jax.sharding.reshard(x, WHOLE), w_in, heads, reduce_f32=reduce_f32)
        return project("btnh,nhd->btd", y, w_out, RESIDUAL, reduce_f32=reduce_f32)

    def plain(x, w_in, w_out):
        return jnp.einsum("btnh,nhd->btd", jnp.einsum("btd,dnh->btnh", x, w_in), w_out)

    def with_gradients(function):
        def run(dy, *inputs):
            y, pull_back = jax.vjp(function, *inputs)
            return y, *pull_back(dy)

        return run

    inputs = (dy, RESIDUAL), (x, RESIDUAL), (w_in, IN_SPEC), (w_out, OUT_SPEC)
    found = run_on(mesh, with_gradients(there_and_back), *inputs)
    expected = with_gradients(plain)(dy, x, w_in, w_out)
    assert_trees_close(found, expected, 1e-6)
    specs = [array.sharding.spec for array in found]
    assert specs == [RESIDUAL, RESIDUAL, P(("fsdp", "expert"), "tensor", None), OUT_SPEC]
    with pytest.raises(AssertionError):
        assert_trees_close(found, with_gradients(plain)(dy, x, w_in, w_out[::-1]), 1e-6)


@pytest.mark.parametrize(("reduce_f32", "expected"), [(True, 257.0), (False, 256.0)])
def test_gradient_of_bfloat16_is_float32_only_if_asked(one_device, reduce_f32, expected):
    x, w = np.ones((1, 257, 1), jnp.bfloat16), np.ones((1, 1), np.float32)

    def gradient(x, w):
        return jax.grad(lambda w: project("btd,df->btf", x, w, WHOLE, reduce_f32=reduce_f32).astype(jnp.float32).sum())(
            w
        )

    found = run_on(one_device, gradient, (x, WHOLE), (w, P(("fsdp", "expert"), "tensor")))
    assert found.dtype == jnp.float32
    assert float(found[0, 0]) == expected
