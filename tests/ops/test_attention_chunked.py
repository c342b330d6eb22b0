import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.ops.attention_chunked import block_pairs, chunked_attention
from lmjax.ops.attention_mask import Mask
from lmjax.ops.attention_reference import reference_attention
from tests.ops.attention_case import PLAIN, Features, forward_and_backward, make_case, run_kernel, run_reference
from tests.ops.sharded import assert_trees_close, count, shapes

MASKS = [Mask(), Mask(window=1), Mask(window=7), Mask(causal=False)]


@pytest.mark.parametrize(
    ("mask", "length", "segmented"),
    [
        *((mask, 29, True) for mask in MASKS),  # the last block is not full
        (Mask(), 24, True),
        (Mask(causal=False), 29, False),
        (Mask(), 5, True),
    ],
    ids=str,
)
def test_values_and_gradients_are_the_references(rng, mask, length, segmented):
    case = make_case(rng, length=length)
    found = run_kernel(chunked_attention, case, mask, segmented=segmented, block=8)
    assert_trees_close(found, run_reference(case, mask, segmented=segmented), 2e-6)


SWITCHES = {"softcap": {"softcap": 1.5}, "alibi": {"alibi": True}, "sinks": {"sinks": True}, "prefix": {"prefix": True}}
PAIRS = [SWITCHES[one] | SWITCHES[other] for one, other in itertools.combinations(SWITCHES, 2)]
ALL = {"softcap": 1.5, "alibi": True, "sinks": True}


@pytest.mark.parametrize(
    ("mask", "features"),
    [
        (Mask(window=7), Features(**ALL)),
        (Mask(), Features(**ALL, prefix=True)),
        (Mask(causal=False), Features(**ALL)),
        *(pytest.param(Mask(), Features(**some), marks=pytest.mark.slow) for some in (*SWITCHES.values(), *PAIRS)),
        *(
            pytest.param(Mask(window=7), Features(**switch), marks=pytest.mark.slow)
            for name, switch in SWITCHES.items()
            if name != "prefix"
        ),
    ],
    ids=str,
)
def test_values_and_gradients_with_features_are_the_references(rng, mask, features):
    """Of sinks too; and each feature changes what is compared."""
    case = make_case(rng, length=21)
    found = run_kernel(chunked_attention, case, mask, features=features, block=8)
    expected = run_reference(case, mask, features=features)
    assert len(found) == len(expected) == (5 if features.sinks else 4)
    assert_trees_close(found, expected, 3e-6)
    for name in str(features).split("+"):
        less = dataclasses.replace(features, **{name: None if name == "softcap" else False})
        with pytest.raises(AssertionError):
            assert_trees_close(found[:4], run_reference(case, mask, features=less)[:4], 1e-3)


def test_sinks_that_take_all_and_none(rng):
    """Scores far above and far below all others: nothing overflows, and gradients are those of the reference."""
    case = make_case(rng)._replace(sinks=np.array([-1e4, -50, 50, 1e4], np.float32))
    found = run_kernel(chunked_attention, case, Mask(), features=Features(sinks=True), block=8)
    assert all(np.all(np.isfinite(array)) for array in found)
    assert not np.any(np.asarray(found[0])[:, :, 3])
    assert_trees_close(found, run_reference(case, Mask(), features=Features(sinks=True)), 2e-6)


@pytest.mark.parametrize("features", [PLAIN, Features(**ALL)], ids=str)
def test_bfloat16_is_near_float32(rng, features):
    case = make_case(rng)
    small = case._replace(**{name: getattr(case, name).astype(jnp.bfloat16) for name in ("q", "k", "v", "dout")})
    found = run_kernel(chunked_attention, small, Mask(), features=features, block=8)
    assert [array.dtype for array in found[:4]] == [jnp.bfloat16] * 4
    assert all(array.dtype == jnp.float32 for array in found[4:])
    assert_trees_close(found, run_reference(case, Mask(), features=features), 3e-2)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("size", [1, 3, 4])
def test_pairs_are_those_with_something_visible(mask, size):
    positions = jnp.arange(6 * size)
    visible = np.asarray(mask.visible(positions[:, None] - positions))
    expected = [
        [i, j] for i, j in np.ndindex(6, 6) if visible[i * size : i * size + size, j * size : j * size + size].any()
    ]
    assert block_pairs(mask, False, 6, size).tolist() == expected
    if mask.window is None:  # a prefix may lie in any block, and every query of its segment sees it
        assert len(block_pairs(mask, True, 6, size)) == 36


@pytest.mark.fast
def test_causal_attention_computes_little_more_than_half():
    assert len(block_pairs(Mask(), False, 32, 512)) == 32 * 33 // 2
    assert len(block_pairs(Mask(window=512), False, 32, 512)) == 2 * 32 - 1


def traced(kernel, length, **options):
    attend = functools.partial(kernel, mask=Mask(), scale=0.3, **options)
    case = make_case(np.random.default_rng(0), batch=1, length=length)
    return jax.make_jaxpr(forward_and_backward(attend))(*case[:3], case.segment_ids, case.dout)


def quadratic(jaxpr, length):
    return [shape for shape in shapes(jaxpr) if sum(size >= length for size in shape) >= 2]


@pytest.mark.parametrize("length", [64, 61])
def test_no_array_is_quadratic_in_the_length_backward_pass_included(length):
    assert not quadratic(traced(chunked_attention, length, block=16), length)
    assert quadratic(traced(reference_attention, length), length)


@pytest.mark.parametrize(("name", "scans"), [("out", 2), ("something else", 3)])
def test_saved_by_name_it_is_not_run_again_for_the_backward_pass(name, scans):
    def attend(q, k, v, segment_ids, **options):
        kept = jax.checkpoint_policies.save_only_these_names("out")
        return jax.checkpoint(lambda q: chunked_attention(q, k, v, segment_ids, **options), policy=kept)(jnp.sin(q))

    assert count(traced(attend, 64, block=16, save_as=name), "scan") == scans
