import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmjax.errors import InputError
from lmjax.ops.attention import KERNELS, attention, choose_kernel
from lmjax.ops.attention_mask import Mask
from tests.ops.attention_case import Case, forward_and_backward, make_case, run_reference
from tests.ops.sharded import BATCH, assert_trees_close, run_on

MASK = Mask(window=5)
HEADS, ALL_HEADS = P(BATCH, None, "tensor", None), P(BATCH, None, None, None)


def run_sharded(mesh, case: Case, kernel: str = "reference"):
    kv_spec = ALL_HEADS if case.k.shape[2] % mesh.shape["tensor"] else HEADS

    def attend(q, k, v, segment_ids):
        return attention(q, k, v, mask=MASK, segment_ids=segment_ids, scale=0.3, kernel=kernel)

    inputs = (case.q, HEADS), (case.k, kv_spec), (case.v, kv_spec), (case.segment_ids, P(BATCH)), (case.dout, HEADS)
    found = run_on(mesh, forward_and_backward(attend), *inputs)
    assert [array.sharding.spec for array in found] == [HEADS, HEADS, kv_spec, kv_spec]
    return found


@pytest.mark.parametrize("num_kv_heads", [8, 2, 1])
def test_values_and_gradients_are_one_devices_on_any_mesh(mesh, rng, num_kv_heads):
    case = make_case(rng, batch=8, length=16, num_heads=8, num_kv_heads=num_kv_heads)
    assert_trees_close(run_sharded(mesh, case), run_reference(case, MASK), 2e-6)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 3), (8, 1)], ids=["group-cut-in-two", "one-kv-head"])
@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_kv_heads_that_the_mesh_does_not_divide(mesh_2x2x2, rng, kernel, num_heads, num_kv_heads):
    case = make_case(rng, batch=4, length=16, num_heads=num_heads, num_kv_heads=num_kv_heads)
    found = run_sharded(mesh_2x2x2, case, kernel)
    assert_trees_close(found, run_reference(case, MASK), 2e-6)
    if num_kv_heads > 1:
        other_heads = case._replace(k=np.roll(case.k, 1, axis=2))
        with pytest.raises(AssertionError):
            assert_trees_close(found, run_reference(other_heads, MASK), 1e-2)


@pytest.mark.parametrize("kernel", ["reference", "chunked"])
def test_no_gradient_reaches_later_positions_or_other_documents(one_device, rng, kernel):
    case = make_case(rng, batch=1)
    query = 9
    dout = np.zeros_like(case.dout)
    dout[:, query] = case.dout[:, query]
    _, _, dk, dv = run_sharded(one_device, case._replace(dout=dout), kernel)
    positions = np.arange(case.q.shape[1])
    visible = (positions <= query) & (positions > query - 5) & (case.segment_ids[0] == case.segment_ids[0, query])
    assert visible.any()
    for gradient in (dk, dv):
        assert (np.abs(np.asarray(gradient)[0]).max(axis=(1, 2)) > 0).tolist() == visible.tolist()


@pytest.mark.fast
@pytest.mark.parametrize(
    ("platform", "length", "name"),
    [
        ("cpu", 128, "reference"),
        ("cpu", 129, "chunked"),
        ("gpu", 1024, "reference"),
        ("gpu", 8192, "chunked"),
        ("tpu", 256, "splash"),
        ("tpu", 8192, "splash"),
        ("tpu", 100, "reference"),
        ("tpu", 8200, "chunked"),
    ],
)
def test_auto_takes_the_kernel_for_the_platform_and_length(platform, length, name):
    choice = choose_kernel("auto", mask=MASK, segmented=True, platform=platform, length=length)
    assert choice.name == name
    assert f"{length} positions on {platform}" in choice.why


@pytest.mark.fast
@pytest.mark.parametrize(
    ("kernel", "platform", "length", "message"),
    [
        ("flash", "cpu", 256, "'flash' is not known; choose one of auto, reference, chunked"),
        (
            "splash",
            "gpu",
            256,
            "'splash' runs on tpu only, not on gpu; those that can do this are auto, reference, chunked",
        ),
        (
            "splash",
            "tpu",
            200,
            "'splash' takes rows of a multiple of 128 positions, not 200; those that can do this are",
        ),
    ],
)
def test_a_kernel_that_cannot_is_refused_with_those_that_can(kernel, platform, length, message):
    with pytest.raises(InputError, match=re.escape(message)):
        choose_kernel(kernel, mask=MASK, segmented=True, platform=platform, length=length)


@pytest.mark.fast
def test_a_kernel_without_a_feature_is_passed_over_and_refused(monkeypatch):
    splash = dataclasses.replace(KERNELS["splash"], features=frozenset({"causal", "bidirectional"}))
    monkeypatch.setitem(KERNELS, "splash", splash)
    choice = choose_kernel("auto", mask=MASK, segmented=True, platform="tpu", length=8192)
    assert choice.name == "chunked"
    assert "splash does not have segments, window" in choice.why
    assert choose_kernel("auto", mask=Mask(), segmented=False, platform="tpu", length=8192).name == "splash"
    with pytest.raises(InputError, match="does not have segments, window; those that can do this are auto, reference"):
        choose_kernel("splash", mask=MASK, segmented=True, platform="tpu", length=8192)


@pytest.mark.fast
def test_a_named_kernel_is_taken():
    assert choose_kernel("chunked", mask=MASK, segmented=True, platform="tpu", length=8).name == "chunked"


def test_platform_is_that_of_the_devices_unless_given(one_device, rng):
    case = make_case(rng, batch=1, length=128)

    def traced(platform):
        def attend(q, k, v, segment_ids):
            inputs = (jax.sharding.reshard(x, HEADS) for x in (q, k, v))
            segment_ids = jax.sharding.reshard(segment_ids, P(BATCH))
            return attention(*inputs, mask=MASK, segment_ids=segment_ids, scale=0.3, platform=platform)

        with jax.set_mesh(one_device):
            return str(jax.make_jaxpr(attend)(*case[:4]))

    assert "pallas_call" not in traced(None)
    assert "pallas_call" in traced("tpu")
