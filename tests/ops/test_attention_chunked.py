import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.ops.attention_chunked import chunked_attention, visible_pairs
from lmjax.ops.attention_mask import Mask
from lmjax.ops.attention_reference import reference_attention
from tests.ops.attention_case import forward_and_backward, make_case, run_kernel, run_reference
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


def test_bfloat16_is_near_float32(rng):
    case = make_case(rng)
    small = case._replace(**{name: getattr(case, name).astype(jnp.bfloat16) for name in ("q", "k", "v", "dout")})
    found = run_kernel(chunked_attention, small, Mask(), block=8)
    assert {array.dtype for array in found} == {jnp.dtype(jnp.bfloat16)}
    assert_trees_close(found, run_reference(case, Mask()), 3e-2)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("size", [1, 3, 4])
def test_pairs_are_those_with_something_visible(mask, size):
    visible = np.asarray(mask.visible(jnp.arange(6 * size), jnp.arange(6 * size)))
    expected = [
        [i, j] for i, j in np.ndindex(6, 6) if visible[i * size : i * size + size, j * size : j * size + size].any()
    ]
    assert visible_pairs(mask, 6, size).tolist() == expected


@pytest.mark.fast
def test_causal_attention_computes_little_more_than_half():
    assert len(visible_pairs(Mask(), 32, 512)) == 32 * 33 // 2
    assert len(visible_pairs(Mask(window=512), 32, 512)) == 2 * 32 - 1


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
