"""What is asked of JAX's function for cuDNN, carried out by its own plain form."""

import pytest

from lmjax.ops.attention_cudnn import cudnn_attention
from lmjax.ops.attention_mask import Mask
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
