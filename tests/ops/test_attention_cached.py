"""Attention over a cache: what the reference gives for the whole row, whatever slots the keys lie in."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.ops.attention_cached import cached_attention
from lmjax.ops.attention_mask import Mask
from tests.ops.attention_case import PLAIN, Features, make_case, run_reference
from tests.ops.sharded import BATCH, assert_trees_close, run_on

import jax  # isort: skip

P = jax.sharding.PartitionSpec
NEW, SLOTS = 5, 32
ALL = Features(softcap=1.5, alibi=True, sinks=True)


def run_cached(mesh, case, window, heads="tensor", dtype=np.float32, features=PLAIN):
    """The last positions of a row whose keys are scattered over more slots than it has, others holding rubbish."""
    batch, length = case.q.shape[:2]
    rng = np.random.default_rng(0)
    num_kv_heads, head_dim = case.k.shape[2:]
    k = rng.normal(size=(batch, num_kv_heads, SLOTS, head_dim)).astype(np.float32)
    v = rng.normal(size=k.shape).astype(np.float32)
    key_positions = np.full((batch, SLOTS), -1, np.int32)
    for row in range(batch):
        slots = rng.permutation(SLOTS)[:length]
        k[row][:, slots], v[row][:, slots] = case.k[row].swapaxes(0, 1), case.v[row].swapaxes(0, 1)
        key_positions[row, slots] = np.arange(length)
    positions = np.broadcast_to(np.arange(length - NEW, length, dtype=np.int32), (batch, NEW))
    rows, kv = P(BATCH, None), P(BATCH, heads, None, None)
    extras = features.extras(case)

    def cached(*inputs):
        given = dict(zip(extras, inputs[5:], strict=True))
        return cached_attention(*inputs[:5], **given, window=window, scale=0.3, **features.options)

    return run_on(
        mesh,
        cached,
        (case.q[:, -NEW:].astype(dtype), P(BATCH, None, "tensor", None)),
        (k.astype(dtype), kv),
        (v.astype(dtype), kv),
        (positions, rows),
        (key_positions, rows),
        *((extra, P("tensor")) for extra in extras.values()),
    )


@pytest.mark.parametrize("window", [None, 4])
def test_equals_the_reference_of_the_whole_row(one_device, rng, window):
    case = make_case(rng)
    expected = run_reference(case, Mask(window=window), segmented=False)[0][:, -NEW:]
    found = run_cached(one_device, case, window)
    assert_trees_close(found, expected, 1e-6)
    with pytest.raises(AssertionError):
        assert_trees_close(run_cached(one_device, case, 3), expected, 1e-3)


@pytest.mark.parametrize("features", [Features(softcap=1.5), Features(alibi=True), Features(sinks=True), ALL], ids=str)
@pytest.mark.parametrize("window", [None, 4])
def test_features_are_those_of_the_reference(one_device, rng, window, features):
    case = make_case(rng)
    expected = run_reference(case, Mask(window=window), segmented=False, features=features)[0][:, -NEW:]
    found = run_cached(one_device, case, window, features=features)
    assert_trees_close(found, expected, 1e-6)
    with pytest.raises(AssertionError):
        assert_trees_close(run_cached(one_device, case, window), expected, 1e-3)


@pytest.mark.parametrize("features", [PLAIN, ALL], ids=str)
@pytest.mark.parametrize(("num_kv_heads", "heads"), [(2, "tensor"), (1, None)])
def test_sharded_equals_one_device(one_device, mesh_2x2x2, rng, num_kv_heads, heads, features):
    case = make_case(rng, batch=4, num_kv_heads=num_kv_heads)
    found = run_cached(mesh_2x2x2, case, 4, heads, features=features)
    assert found.sharding.spec == P(BATCH, None, heads, None)
    assert_trees_close(found, run_cached(one_device, case, 4, features=features), 1e-6)


def test_bfloat16_is_near_float32(one_device, rng):
    case = make_case(rng)
    found = run_cached(one_device, case, 4, dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    assert_trees_close(found, run_cached(one_device, case, 4), 3e-2)


def test_a_query_of_padding_gives_zero_and_an_empty_cache_nothing(one_device, rng):
    case = make_case(rng, length=NEW)
    rows, heads, kv_heads = P(BATCH, None), P(BATCH, None, "tensor", None), P(BATCH, "tensor", None, None)
    padding = np.array([[0, 1, 2, -1, -1], [-1, -1, -1, -1, -1]], np.int32)
    found = run_on(
        one_device,
        functools.partial(cached_attention, window=None, scale=0.3),
        (case.q, heads),
        (case.k.swapaxes(1, 2), kv_heads),
        (case.v.swapaxes(1, 2), kv_heads),
        (padding, rows),
        (padding, rows),
    )
    np.testing.assert_array_equal(np.any(found, axis=(2, 3)), padding >= 0)
