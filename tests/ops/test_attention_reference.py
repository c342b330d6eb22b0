import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.ops.attention_mask import Mask
from lmjax.ops.attention_reference import reference_attention
from tests.ops.attention_case import PLAIN, Features, make_case, run_kernel, run_reference
from tests.ops.sharded import assert_trees_close

CAUSAL, WINDOW, BOTH_WAYS = Mask(), Mask(window=5), Mask(causal=False)
EACH = [Features(softcap=1.5), Features(alibi=True), Features(sinks=True), Features(prefix=True)]
LESS = {
    "softcap": {"softcap": 1.7},
    "alibi": {"alibi": False},
    "sinks": {"sinks": False},
    "prefix": {"prefix": False},
}
"""A feature's name and a change of it that has to be seen."""


@pytest.mark.parametrize(
    ("mask", "segmented", "features"),
    [
        *((mask, segmented, PLAIN) for mask in (CAUSAL, WINDOW, BOTH_WAYS) for segmented in (True, False)),
        *((CAUSAL, True, features) for features in EACH),
        (WINDOW, False, Features(softcap=1.5, alibi=True)),
        (BOTH_WAYS, True, Features(alibi=True)),
        (WINDOW, True, Features(alibi=True, sinks=True)),
        (CAUSAL, True, Features(prefix=True, alibi=True, sinks=True)),
        (CAUSAL, False, Features(prefix=True, softcap=1.5)),
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_transformers(rng, mask, segmented, features):
    pytest.importorskip("transformers")
    from tests.ops.eager_attention import eager_attention

    case = make_case(rng)
    found = run_reference(case, mask, segmented=segmented, features=features)
    assert_trees_close(found, eager_attention(case, mask, features, segmented), 3e-6)
    for name in str(features).split("+"):
        if name in LESS:
            changed = eager_attention(case, mask, dataclasses.replace(features, **LESS[name]), segmented)
            with pytest.raises(AssertionError):
                assert_trees_close(found[:4], changed[:4], 1e-3)


def test_values_and_gradients_are_torchs(rng):
    """By a kernel of torch's own, which has no extras."""
    torch = pytest.importorskip("torch")
    case = make_case(rng)
    q, k, v = (torch.tensor(array, requires_grad=True) for array in (case.q, case.k, case.v))
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, scale=0.3, enable_gqa=True)
    out = out.transpose(1, 2)
    out.backward(torch.tensor(case.dout))
    expected = [x.detach().numpy() for x in (out, q.grad, k.grad, v.grad)]
    assert_trees_close(run_reference(case, CAUSAL, segmented=False), expected, 2e-6)


@pytest.mark.parametrize(
    ("mask", "segmented", "features", "length", "block"),
    [
        (CAUSAL, True, PLAIN, 24, 7),
        (WINDOW, True, PLAIN, 23, 8),
        (Mask(window=11), False, Features(alibi=True, sinks=True), 29, 4),
        (BOTH_WAYS, True, Features(softcap=1.5), 23, 8),
        (CAUSAL, True, Features(prefix=True, alibi=True, sinks=True, softcap=1.5), 23, 8),
        (CAUSAL, True, Features(sinks=True), 5, 8),
    ],
    ids=str,
)
def test_blocks_of_queries_change_nothing(rng, mask, segmented, features, length, block):
    case = make_case(rng, length=length)
    found = run_kernel(reference_attention, case, mask, segmented=segmented, features=features, block=block)
    expected = run_reference(case, mask, segmented=segmented, features=features)
    assert_trees_close(found, expected, 2e-6)
    with pytest.raises(AssertionError):
        assert_trees_close(found, [np.roll(array, 1, axis=-1) for array in expected], 1e-2)


def test_a_sink_takes_its_part_of_the_weights(rng):
    """Of a first token whose value is ones the result is 1 less the part of the sink: none, half, all."""
    case = make_case(rng, batch=1, length=4, num_heads=3, num_kv_heads=1)
    score = 0.3 * float((case.q[0, 0, :1] @ case.k[0, 0, 0])[0])
    same_heads = np.broadcast_to(case.q[:, :, :1], case.q.shape)
    sinks = np.array([-1e9, score, 1e9], np.float32)
    case = case._replace(q=same_heads, v=np.ones_like(case.v), sinks=sinks)
    found = run_reference(case, CAUSAL, segmented=False, features=Features(sinks=True))[0]
    np.testing.assert_allclose(found[0, 0, :, 0], [1, 0.5, 0], atol=1e-6)


def test_a_packed_row_is_its_documents_run_apart(rng):
    case = make_case(rng, batch=1)
    packed = run_reference(case, WINDOW)
    for document in (1, 2):
        own = case.segment_ids[0] == document
        alone = case._replace(**{name: getattr(case, name)[:, own] for name in ("q", "k", "v", "dout")})
        expected = run_reference(alone, WINDOW, segmented=False)
        assert_trees_close([array[:, own] for array in packed], expected, 1e-6)


@pytest.mark.parametrize("features", [PLAIN, Features(sinks=True, alibi=True, prefix=True)], ids=str)
def test_padding_gives_zero_and_no_gradient(rng, features):
    case = make_case(rng)
    padding = case.segment_ids == 0
    assert padding.any()
    for array in run_reference(case, CAUSAL, features=features)[:4]:
        assert not np.any(np.asarray(array)[padding])
        assert np.all(np.isfinite(array))


def test_bfloat16_is_near_float32(rng):
    case = make_case(rng)
    features = Features(sinks=True, alibi=True, softcap=1.5)
    small = case._replace(**{name: getattr(case, name).astype(jnp.bfloat16) for name in ("q", "k", "v", "dout")})
    found = run_reference(small, WINDOW, features=features)
    assert [array.dtype for array in found] == [jnp.bfloat16] * 4 + [jnp.float32]
    assert_trees_close(found, run_reference(case, WINDOW, features=features), 3e-2)


def test_comparison_sees_a_window_longer_by_one(rng):
    case = make_case(rng)
    wider = run_kernel(reference_attention, case, dataclasses.replace(WINDOW, window=6))
    with pytest.raises(AssertionError):
        assert_trees_close(run_reference(case, WINDOW), wider, 1e-2)
