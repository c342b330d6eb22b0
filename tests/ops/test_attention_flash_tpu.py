"""The TPU kernels' programs, interpreted with every race looked for, against the reference."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lmjax.ops import attention_flash_tpu
from lmjax.ops.attention_flash_tpu import flash_attention_tpu, flash_visits
from lmjax.ops.attention_mask import Mask
from lmjax.ops.attention_reference import reference_attention
from tests.ops.attention_case import PLAIN, Features, make_case, run_kernel, run_reference
from tests.ops.flash_cases import (
    FEATURES_ALONE,
    TILING,
    SweepCase,
    check_that_a_feature_has_an_effect,
    relative_errors,
    sweep,
    sweep_in_tiers,
)
from tests.ops.sharded import assert_trees_close

RACES = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
"""As on a chip of two cores, which share the first dimension of a grid."""


@pytest.mark.parametrize("drawn", sweep_in_tiers(200))
def test_values_and_gradients_are_the_references_without_a_race(drawn: SweepCase, capfd):
    case = drawn.arrays()
    found = run_kernel(
        flash_attention_tpu,
        case,
        drawn.mask,
        segmented=drawn.segmented,
        features=drawn.features,
        tiling=TILING,
        interpret=RACES,
    )
    jax.block_until_ready(found)
    assert "RACE" not in capfd.readouterr().out
    expected = run_reference(case, drawn.mask, segmented=drawn.segmented, features=drawn.features)
    error, *gradient_errors = relative_errors(found, expected)
    assert error < 1e-5
    assert max(gradient_errors) < 1e-4


def test_a_race_is_noticed(capfd):
    """Both cores write one block."""

    def kernel(out_ref):
        out_ref[...] = jnp.ones_like(out_ref)

    def run():
        return pl.pallas_call(
            kernel,
            grid=(2,),
            out_specs=pl.BlockSpec((8, 128), lambda _: (0, 0)),
            out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
            interpret=RACES,
        )()

    if "on_race" in {field.name for field in dataclasses.fields(pltpu.InterpretParams)}:  # JAX 0.12
        with pytest.raises(jax.errors.JaxRuntimeError, match="(?i)race"):
            jax.block_until_ready(run())
    else:
        jax.block_until_ready(run())
        assert "RACE DETECTED" in capfd.readouterr().out


@pytest.mark.fast
def test_the_sweep_has_every_pair_of_features_and_every_head_dim():
    cases = sweep(200)
    together = {frozenset(pair) for case in cases for pair in itertools.combinations(case.wanted, 2)}
    names = {"causal", "bidirectional", "window", "segments", "prefix", "softcap", "alibi", "sinks"}
    never = [
        {"causal", "bidirectional"},
        {"window", "bidirectional"},
        {"prefix", "bidirectional"},
        {"prefix", "window"},
    ]
    assert together == {frozenset(pair) for pair in itertools.combinations(names, 2)} - {frozenset(x) for x in never}
    assert {case.head_dim for case in cases} == {64, 80, 96, 128, 192, 256}
    assert any(case.value_dim != case.head_dim for case in cases)
    assert any(case.length % TILING.tile for case in cases)
    assert len({str(case) for case in cases}) == 200


@pytest.mark.parametrize("feature", FEATURES_ALONE)
def test_each_feature_has_an_effect(rng, feature):
    check_that_a_feature_has_an_effect(flash_attention_tpu, rng, feature, tiling=TILING, interpret=True)


def test_bfloat16_is_as_near_to_the_truth_as_the_reference(rng):
    case = make_case(rng, batch=1, length=300, num_heads=2, num_kv_heads=1, head_dim=64)
    rounded = case._replace(**{name: rounded_to_bfloat16(getattr(case, name)) for name in ("q", "k", "v", "dout")})
    truth = run_reference(rounded, Mask())
    low = rounded._replace(**{name: jnp.bfloat16(getattr(rounded, name)) for name in ("q", "k", "v", "dout")})
    errors = []
    for kernel, options in ((reference_attention, {}), (flash_attention_tpu, {"tiling": TILING, "interpret": True})):
        found = run_kernel(kernel, low, Mask(), **options)
        assert {x.dtype for x in found} == {jnp.dtype("bfloat16")}
        errors.append([float(jnp.sqrt(jnp.square(x - y).mean())) for x, y in zip(found, truth, strict=True)])
    (references, *of_gradients), (ours, *of_our_gradients) = errors
    assert ours < references
    # Flash attention makes gradients from the rounded result; the reference has its weights in float32.
    assert all(x < 1.5 * y for x, y in zip(of_our_gradients, of_gradients, strict=True))


def rounded_to_bfloat16(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.bfloat16(x), np.float32)


def test_nothing_passes_between_packed_documents(rng):
    """In either direction, and not in the backward pass: a gradient of one document's result stays within it."""
    case = make_case(rng, batch=1, length=300, num_heads=2, num_kv_heads=1, head_dim=16)
    ids = case.segment_ids[0]
    document = ids == 2
    dout = np.where(document[None, :, None, None], case.dout, 0)
    noisy = case._replace(
        **{name: np.where(document[None, :, None, None], getattr(case, name), 1e3) for name in ("k", "v")}
    )
    for mask in (Mask(), Mask(causal=False)):
        found = run_kernel(flash_attention_tpu, case._replace(dout=dout), mask, tiling=TILING, interpret=True)
        for gradient in found[1:]:
            assert (np.abs(gradient[0]).max((1, 2)) > 0).tolist() == document.tolist()
        disturbed = run_kernel(flash_attention_tpu, noisy, mask, tiling=TILING, interpret=True)
        np.testing.assert_array_equal(disturbed[0][0, document], found[0][0, document])


def test_a_window_ends_where_it_should(rng):
    """Query q sees key k where q - window < k <= q, on both sides of tiles' edges."""
    case = make_case(rng, batch=1, length=300, num_heads=1, num_kv_heads=1, head_dim=8)
    for query in (127, 128, 255, 256, 299):
        dout = np.zeros_like(case.dout)
        dout[:, query] = 1
        *_, dv = run_kernel(
            flash_attention_tpu,
            case._replace(dout=dout),
            Mask(window=129),
            segmented=False,
            tiling=TILING,
            interpret=True,
        )
        touched = np.flatnonzero(np.abs(dv[0]).max((1, 2)) > 0)
        assert (touched[0], touched[-1]) == (max(0, query - 128), query)
        assert len(touched) == touched[-1] - touched[0] + 1


def test_rows_of_padding_give_zeros_and_no_nan(rng):
    case = make_case(rng, batch=2, length=300, num_heads=2, num_kv_heads=1, head_dim=8)
    segment_ids = case.segment_ids.copy()
    segment_ids[0] = 0
    for features in (PLAIN, Features(sinks=True)):
        out, *gradients = run_kernel(
            flash_attention_tpu,
            case._replace(segment_ids=segment_ids),
            Mask(),
            features=features,
            tiling=TILING,
            interpret=True,
        )
        for x in (out, *gradients[:3]):
            assert not np.asarray(x[0]).any()
            assert np.isfinite(x).all()
            assert np.asarray(x[1]).any()


def test_the_softcap_comes_before_the_mask(rng):
    """A hidden key stays hidden: capped after the mask it would weigh exp(-softcap)."""
    case = make_case(rng, batch=1, length=200, num_heads=1, num_kv_heads=1, head_dim=8)
    large = case._replace(v=np.where(np.arange(200)[None, :, None, None] > 100, 1e6, case.v).astype(np.float32))
    options = {"segmented": False, "features": Features(softcap=0.1), "tiling": TILING, "interpret": True}
    found, same = (run_kernel(flash_attention_tpu, each, Mask(), **options)[0] for each in (large, case))
    np.testing.assert_array_equal(found[:, :101], same[:, :101])


@pytest.mark.parametrize("wrong", ["segments", "prefix"])
def test_what_the_kernel_cannot_express_gives_nan_in_that_row_alone(rng, wrong):
    case = make_case(rng, batch=2, length=200, num_heads=1, num_kv_heads=1, head_dim=8)
    segment_ids, prefix = np.ones((2, 200), np.int32), np.zeros((2, 200), bool)
    if wrong == "segments":
        segment_ids[1, 50:90] = 2
    else:
        prefix[1, 50:90] = True
    changed = case._replace(segment_ids=segment_ids, prefix=prefix)
    features = Features(prefix=wrong == "prefix")
    for x in run_kernel(flash_attention_tpu, changed, Mask(), features=features, tiling=TILING, interpret=True):
        assert np.isfinite(x[0]).all()
        assert np.isnan(x[1]).any()


def test_of_the_forward_pass_the_result_and_one_number_a_query_are_kept(rng):
    case = make_case(rng, batch=1, length=256, num_heads=4, num_kv_heads=2, head_dim=16)

    def forward(q, k, v):
        return jax.vjp(lambda *x: flash_attention_tpu(*x, None, mask=Mask(), scale=1.0, interpret=True), q, k, v)[1]

    kept = jax.tree.leaves(jax.eval_shape(forward, case.q, case.k, case.v))
    inputs = sorted([case.q.size, case.k.size, case.v.size])
    assert sorted(x.size for x in kept if x.size > 300) == sorted([*inputs, case.q.size, 4 * 256])


def test_rows_whose_steps_do_not_fit_together_are_taken_one_by_one(rng, monkeypatch):
    case = make_case(rng, batch=3, length=200, num_heads=2, num_kv_heads=1, head_dim=8)
    features = Features(sinks=True, prefix=True)
    options = {"features": features, "tiling": TILING, "interpret": True}
    together = run_kernel(flash_attention_tpu, case, Mask(), **options)
    monkeypatch.setattr(attention_flash_tpu, "MAX_STEPS", 11)  # of 12
    one_by_one = run_kernel(flash_attention_tpu, case, Mask(), **options)
    assert_trees_close(one_by_one, together, 1e-6)
    program = jax.make_jaxpr(lambda: run_kernel(flash_attention_tpu, case, Mask(), **options))()
    assert "scan" in str(program)


def test_a_row_whose_steps_do_not_fit_has_larger_tiles(rng, monkeypatch):
    case = make_case(rng, batch=2, length=300, num_heads=2, num_kv_heads=1, head_dim=8)
    options = {"tiling": TILING, "interpret": True}
    assert flash_visits(case.segment_ids, None, mask=Mask(), dims=8, **options).by_query.tiles_W.shape == (1, 2 * 6)
    monkeypatch.setattr(attention_flash_tpu, "MAX_STEPS", 5)
    assert flash_visits(case.segment_ids, None, mask=Mask(), dims=8, **options).by_query.tiles_W.shape == (2, 3)
    found = run_kernel(flash_attention_tpu, case, Mask(), **options)
    assert_trees_close(found, run_reference(case, Mask()), 3e-6)
