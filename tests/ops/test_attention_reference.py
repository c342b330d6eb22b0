import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.ops.attention_mask import Mask
from lmjax.ops.attention_reference import reference_attention
from tests.ops.attention_case import make_case, run_kernel, run_reference
from tests.ops.sharded import assert_trees_close

CAUSAL, WINDOW = Mask(), Mask(window=5)


@pytest.mark.parametrize("mask", [CAUSAL, WINDOW, Mask(causal=False)], ids=str)
@pytest.mark.parametrize("segmented", [True, False])
def test_values_and_gradients_are_torchs(rng, mask, segmented):
    torch = pytest.importorskip("torch")
    case = make_case(rng)
    length = case.q.shape[1]
    sees = np.zeros((2, 1, length, length), bool)
    for row, i, j in np.ndindex(2, length, length):
        inside = (not mask.causal or j <= i) and (mask.window is None or i - j < mask.window)
        one_document = not segmented or case.segment_ids[row, i] == case.segment_ids[row, j] != 0
        sees[row, 0, i, j] = inside and one_document
    is_padding = case.segment_ids == 0 if segmented else np.zeros_like(case.segment_ids, bool)
    sees[:, 0] |= is_padding[:, :, None]  # torch gives nan for a query that sees nothing; its result is dropped below
    q, k, v = (torch.tensor(array, requires_grad=True) for array in (case.q, case.k, case.v))
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=torch.tensor(sees), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    out = out * torch.tensor(~is_padding)[:, :, None, None]
    out.backward(torch.tensor(case.dout))
    expected = [x.detach().numpy() for x in (out, q.grad, k.grad, v.grad)]
    assert_trees_close(run_reference(case, mask, segmented=segmented), expected, 2e-6)


def test_a_packed_row_is_its_documents_run_apart(rng):
    case = make_case(rng, batch=1)
    packed = run_reference(case, WINDOW)
    for document in (1, 2):
        own = case.segment_ids[0] == document
        alone = case._replace(**{name: getattr(case, name)[:, own] for name in ("q", "k", "v", "dout")})
        expected = run_reference(alone, WINDOW, segmented=False)
        assert_trees_close([array[:, own] for array in packed], expected, 1e-6)


def test_padding_gives_zero_and_no_gradient(rng):
    case = make_case(rng)
    padding = case.segment_ids == 0
    assert padding.any()
    for array in run_reference(case, CAUSAL):
        assert not np.any(np.asarray(array)[padding])
        assert np.all(np.isfinite(array))


def test_bfloat16_is_near_float32(rng):
    case = make_case(rng)
    small = case._replace(**{name: getattr(case, name).astype(jnp.bfloat16) for name in ("q", "k", "v", "dout")})
    found = run_reference(small, WINDOW)
    assert {array.dtype for array in found} == {jnp.dtype(jnp.bfloat16)}
    assert_trees_close(found, run_reference(case, WINDOW), 3e-2)


def test_comparison_sees_a_window_longer_by_one(rng):
    case = make_case(rng)
    wider = run_kernel(reference_attention, case, dataclasses.replace(WINDOW, window=6))
    with pytest.raises(AssertionError):
        assert_trees_close(run_reference(case, WINDOW), wider, 1e-2)
