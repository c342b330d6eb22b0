"""What is asked of JAX's function for cuDNN, carried out by its own plain form; and by cuDNN, compiled for an H200."""

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from lmjax.ops.attention_cudnn import cudnn_attention
from lmjax.ops.attention_mask import Mask
from lmjax.plan.topology import topology_devices
from tests.ops.attention_case import make_case, run_kernel, run_reference
from tests.ops.sharded import assert_trees_close


@pytest.mark.parametrize("mask", [Mask(), Mask(window=5), Mask(window=1), Mask(causal=False)], ids=str)
def test_values_and_gradients_are_the_references(rng, mask):
    case = make_case(rng, num_heads=4, num_kv_heads=2)
    found = run_kernel(cudnn_attention, case, mask, segmented=False, implementation="xla")
    assert_trees_close(found, run_reference(case, mask, segmented=False), 2e-5)
    other = Mask(window=mask.window + 1) if mask.window else Mask(causal=not mask.causal)
    with pytest.raises(AssertionError):
        assert_trees_close(found, run_reference(case, other, segmented=False), 1e-2)


@pytest.mark.proof
@pytest.mark.parametrize("length", [2048, 1002])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("mask", [Mask(), Mask(window=300), Mask(causal=False)], ids=str)
def test_cudnn_takes_what_the_table_says_on_an_h200(mask, head_dim, length):
    pytest.importorskip("jax_plugins.xla_cuda13")
    sharding = SingleDeviceSharding(topology_devices("h200:1")[0])
    q, kv = (jax.ShapeDtypeStruct((2, length, heads, head_dim), "bfloat16", sharding=sharding) for heads in (8, 2))

    def run(q, k, v, dout):
        return jax.vjp(lambda *inputs: cudnn_attention(*inputs, None, mask=mask, scale=0.1), q, k, v)[1](dout)

    program = jax.jit(run).trace(q, kv, kv, q).lower(lowering_platforms=("cuda",)).compile()
    text = program.as_text()
    assert text is not None
    assert "fmha" in text
