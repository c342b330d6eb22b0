import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lmjax.errors import InputError
from lmjax.ops.attention import KERNELS, attention, choose_kernel, wanted_features
from lmjax.ops.attention_mask import Mask
from tests.ops.attention_case import PLAIN, Case, Features, forward_and_backward, make_case, run_reference
from tests.ops.sharded import BATCH, assert_trees_close, run_on

MASK = Mask(window=5)
FEATURES = wanted_features(MASK, segments=True)
HEADS, ALL_HEADS = P(BATCH, None, "tensor", None), P(BATCH, None, None, None)


EXTRAS = {"prefix": P(BATCH), "slopes": P("tensor"), "sinks": P("tensor")}


def run_sharded(mesh, case: Case, kernel: str = "reference", mask: Mask = MASK, features: Features = PLAIN):
    kv_spec = ALL_HEADS if case.k.shape[2] % mesh.shape["tensor"] else HEADS
    wanted = [name for name, is_wanted in zip(EXTRAS, features.extras_wanted, strict=True) if is_wanted]

    def attend(q, k, v, segment_ids, **extras):
        return attention(
            q, k, v, mask=mask, segment_ids=segment_ids, scale=0.3, kernel=kernel, **features.options, **extras
        )

    def run(q, k, v, segment_ids, dout, *extras):
        return forward_and_backward(attend)(q, k, v, segment_ids, dout, dict(zip(wanted, extras, strict=True)))

    inputs = (case.q, HEADS), (case.k, kv_spec), (case.v, kv_spec), (case.segment_ids, P(BATCH)), (case.dout, HEADS)
    found = run_on(mesh, run, *inputs, *((getattr(case, name), EXTRAS[name]) for name in wanted))
    specs = [HEADS, HEADS, kv_spec, kv_spec, *([P("tensor")] if features.sinks else [])]
    assert [array.sharding.spec for array in found] == specs
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


@pytest.mark.parametrize(
    ("mask", "features"),
    [(MASK, Features(softcap=1.5, alibi=True, sinks=True)), (Mask(), Features(prefix=True, alibi=True, sinks=True))],
    ids=str,
)
@pytest.mark.parametrize("kernel", ["reference", pytest.param("chunked", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (6, 3)], ids=["kv-heads-split", "kv-heads-whole"])
def test_every_device_has_the_slopes_and_sinks_of_its_heads(
    mesh_2x2x2, rng, kernel, num_heads, num_kv_heads, mask, features
):
    case = make_case(rng, batch=4, length=16, num_heads=num_heads, num_kv_heads=num_kv_heads)
    found = run_sharded(mesh_2x2x2, case, kernel, mask, features)
    assert_trees_close(found, run_reference(case, mask, features=features), 3e-6)
    for name in ("slopes", "sinks"):
        other = case._replace(**{name: np.roll(getattr(case, name), num_heads // 2)})
        with pytest.raises(AssertionError):
            assert_trees_close(found, run_reference(other, mask, features=features), 1e-2)


@pytest.mark.parametrize("mask", [MASK, Mask(causal=False)], ids=str)
def test_a_prefix_with_a_window_or_without_causality_is_refused(one_device, rng, mask):
    case = make_case(rng)
    with pytest.raises(InputError, match="a prefix goes with a causal mask without a window"):
        run_sharded(one_device, case, mask=mask, features=Features(prefix=True))


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
        ("cpu", 1024, "reference"),
        ("cpu", 1025, "chunked"),
        ("gpu", 1024, "reference"),
        ("gpu", 8192, "chunked"),
        ("tpu", 256, "splash"),
        ("tpu", 8192, "splash"),
        ("tpu", 100, "reference"),
        ("tpu", 8200, "chunked"),
    ],
)
def test_auto_takes_the_kernel_for_the_platform_and_length(platform, length, name):
    choice = choose_kernel("auto", features=FEATURES, platform=platform, length=length)
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
        choose_kernel(kernel, features=FEATURES, platform=platform, length=length)


@pytest.mark.fast
def test_a_kernel_without_a_feature_is_passed_over_and_refused(monkeypatch):
    splash = dataclasses.replace(KERNELS["splash"], features=frozenset({"causal", "bidirectional"}))
    monkeypatch.setitem(KERNELS, "splash", splash)
    choice = choose_kernel("auto", features=FEATURES, platform="tpu", length=8192)
    assert choice.name == "chunked"
    assert "splash does not have segments, window" in choice.why
    assert choose_kernel("auto", features=frozenset({"causal"}), platform="tpu", length=8192).name == "splash"
    with pytest.raises(InputError, match="does not have segments, window; those that can do this are auto, reference"):
        choose_kernel("splash", features=FEATURES, platform="tpu", length=8192)


@pytest.mark.fast
@pytest.mark.parametrize("feature", ["prefix", "alibi", "sinks"])
def test_what_splash_lacks_is_left_to_others(feature):
    wanted = wanted_features(Mask(), segments=True, softcap=True, **{feature: True})
    assert wanted == {"causal", "segments", "softcap", feature}
    choice = choose_kernel("auto", features=wanted, platform="tpu", length=2048)
    assert choice.name == "chunked"
    assert f"splash does not have {feature}" in choice.why
    message = f"'splash' does not have {feature}; those that can do this are auto, reference, chunked"
    with pytest.raises(InputError, match=re.escape(message)):
        choose_kernel("splash", features=wanted, platform="tpu", length=2048)
    assert choose_kernel("splash", features=wanted - {feature}, platform="tpu", length=2048).name == "splash"


@pytest.mark.fast
def test_features_are_those_of_the_mask_and_of_what_is_used():
    assert wanted_features(Mask()) == {"causal"}
    assert wanted_features(Mask(causal=False)) == {"bidirectional"}
    every = wanted_features(MASK, segments=True, prefix=True, softcap=True, alibi=True, sinks=True)
    assert every == {"causal", "window", "segments", "prefix", "softcap", "alibi", "sinks"}
    assert every | {"bidirectional"} == KERNELS["reference"].features == KERNELS["chunked"].features


@pytest.mark.fast
def test_a_named_kernel_is_taken():
    assert choose_kernel("chunked", features=FEATURES, platform="tpu", length=8).name == "chunked"


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
