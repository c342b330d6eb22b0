import pytest

from lmjax.ops.attention_mask import Mask
from lmjax.ops.attention_splash import splash_attention
from tests.ops.attention_case import make_case, run_kernel, run_reference
from tests.ops.sharded import assert_trees_close


@pytest.mark.parametrize(
    ("mask", "segmented"),
    [(Mask(), True), (Mask(window=150), True), (Mask(causal=False), False)],
    ids=str,
)
def test_values_and_gradients_are_the_references(rng, mask, segmented):
    case = make_case(rng, batch=1, length=384, num_heads=2, num_kv_heads=1, head_dim=32)  # three blocks of 128
    found = run_kernel(splash_attention, case, mask, segmented=segmented, interpret=True)
    assert_trees_close(found, run_reference(case, mask, segmented=segmented), 2e-5)
    if segmented:
        with pytest.raises(AssertionError):
            assert_trees_close(found, run_reference(case, mask, segmented=False), 1e-2)
