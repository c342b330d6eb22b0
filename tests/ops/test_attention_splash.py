import pytest

from lmjax.ops.attention_mask import Mask
from lmjax.ops.attention_splash import splash_attention
from tests.ops.attention_case import PLAIN, Features, make_case, run_kernel, run_reference
from tests.ops.sharded import assert_trees_close


@pytest.mark.parametrize(
    ("mask", "segmented", "features"),
    [
        (Mask(), True, PLAIN),
        (Mask(window=150), True, Features(softcap=1.5)),
        (Mask(causal=False), False, PLAIN),
        pytest.param(Mask(), False, Features(softcap=1.5), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_values_and_gradients_are_the_references(rng, mask, segmented, features):
    case = make_case(rng, batch=1, length=384, num_heads=2, num_kv_heads=1, head_dim=32)  # three blocks of 128
    found = run_kernel(splash_attention, case, mask, segmented=segmented, features=features, interpret=True)
    assert_trees_close(found, run_reference(case, mask, segmented=segmented, features=features), 2e-5)
    if features.softcap:
        with pytest.raises(AssertionError):
            assert_trees_close(found, run_reference(case, mask, segmented=segmented), 1e-2)
    if segmented:
        with pytest.raises(AssertionError):
            assert_trees_close(found, run_reference(case, mask, segmented=False, features=features), 1e-2)
