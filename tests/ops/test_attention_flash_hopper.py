"""The Hopper kernels' programs: interpreted against the reference with every race looked for, and lowered for a GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lmjax.ops.attention_flash_hopper import flash_attention_hopper
from lmjax.ops.attention_mask import Mask
from lmjax.ops.attention_reference import reference_attention
from tests.ops.attention_case import PLAIN, Features, make_case, run_kernel, run_reference
from tests.ops.flash_cases import (
    FEATURES_ALONE,
    SweepCase,
    check_that_a_feature_has_an_effect,
    relative_errors,
    sweep_in_tiers,
)

HAS_INTERPRETER = jax.__version_info__ >= (0, 12)
RACES: Any = plgpu.InterpretGPUParams(detect_races=True) if HAS_INTERPRETER else None  # pyright: ignore
interpreted = pytest.mark.skipif(not HAS_INTERPRETER, reason="JAX before 0.12 cannot interpret the kernels")


def run_interpreted(case, mask: Mask, **options):
    return run_kernel(flash_attention_hopper, case, mask, interpret=RACES, **options)


@interpreted
@pytest.mark.parametrize("drawn", sweep_in_tiers(200, longest=260))
def test_values_and_gradients_are_the_references_without_a_race(drawn: SweepCase):
    case = drawn.arrays()
    found = run_interpreted(case, drawn.mask, segmented=drawn.segmented, features=drawn.features)
    expected = run_reference(case, drawn.mask, segmented=drawn.segmented, features=drawn.features)
    error, *gradient_errors = relative_errors(found, expected)
    assert error < 1e-5
    assert max(gradient_errors) < 1e-4


@interpreted
def test_a_race_is_noticed():
    """One warpgroup writes what another one reads without having waited for it."""

    def kernel(out_ref, smem_ref):
        warpgroup = jax.lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _():
            smem_ref[...] = jnp.ones_like(smem_ref)

        @pl.when(warpgroup == 1)
        def _():
            out_ref[...] = smem_ref[...]

    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
        scratch_types=[plgpu.SMEM((128,), jnp.float32)],
        num_threads=2,
        thread_name="warpgroup",
        interpret=RACES,
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="(?i)race"):
        jax.block_until_ready(run())


@interpreted
@pytest.mark.parametrize("feature", FEATURES_ALONE)
def test_each_feature_has_an_effect(rng, feature):
    check_that_a_feature_has_an_effect(flash_attention_hopper, rng, feature, interpret=RACES)


@interpreted
def test_rows_of_padding_give_zeros_and_rows_that_cannot_be_expressed_give_nan(rng):
    case = make_case(rng, batch=3, length=150, num_heads=2, num_kv_heads=1, head_dim=8)
    segment_ids = case.segment_ids.copy()
    segment_ids[0] = 0
    segment_ids[1] = 1
    segment_ids[1, 50:90] = 2
    for features in (PLAIN, Features(sinks=True)):
        changed = case._replace(segment_ids=segment_ids)
        found = run_interpreted(changed, Mask(), features=features)
        expected = run_reference(changed, Mask(), features=features)
        for x, y in zip(found[:4], expected[:4], strict=True):
            assert not np.asarray(x[0]).any()
            assert np.isnan(x[1]).any()
            np.testing.assert_allclose(x[2], y[2], atol=1e-5)


@interpreted
def test_bfloat16_is_as_near_to_the_truth_as_the_reference(rng):
    case = make_case(rng, batch=1, length=200, num_heads=2, num_kv_heads=1, head_dim=64)
    names = "q", "k", "v", "dout"
    low = case._replace(**{name: jnp.bfloat16(getattr(case, name)) for name in names})
    truth = run_reference(low._replace(**{name: np.float32(getattr(low, name)) for name in names}), Mask())
    errors = []
    for found in (run_kernel(reference_attention, low, Mask()), run_interpreted(low, Mask())):
        assert {x.dtype for x in found} == {jnp.dtype("bfloat16")}
        errors.append([float(jnp.sqrt(jnp.square(x - y).mean())) for x, y in zip(found, truth, strict=True)])
    # Weights are rounded before their product with values, which the reference has in float32.
    assert all(ours < 1.5 * references for references, ours in zip(*errors, strict=True))


@pytest.mark.parametrize(
    ("head_dim", "value_dim", "dtype", "mask", "options"),
    [
        (128, 128, "bfloat16", Mask(), {}),
        (80, 80, "float16", Mask(window=700), {"softcap": 30.0}),
        pytest.param(256, 256, "bfloat16", Mask(causal=False), {}, marks=pytest.mark.slow),
        pytest.param(192, 128, "bfloat16", Mask(), {"softcap": 30.0}, marks=pytest.mark.slow),
    ],
)
def test_every_kernel_is_lowered_for_a_gpu(head_dim, value_dim, dtype, mask, options):
    """As far as this goes without the compiler for GPUs: layouts and shared memory are found for all of it."""
    B, T, N, K = 2, 1000, 4, 2
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    queries, keys = shape((B, T, N, head_dim)), shape((B, T, K, head_dim))
    values, douts = shape((B, T, K, value_dim)), shape((B, T, N, value_dim))
    extras = {
        "slopes_N": jax.ShapeDtypeStruct((N,), "float32"),
        "sinks_N": jax.ShapeDtypeStruct((N,), "float32"),
    }

    def run(q, k, v, segment_ids, dout, extras):
        def attend(q, k, v):
            return flash_attention_hopper(q, k, v, segment_ids, **extras, mask=mask, scale=0.1, **options)

        out, pull_back = jax.vjp(attend, q, k, v)
        return out, pull_back(dout)

    segment_ids = jax.ShapeDtypeStruct((B, T), "int32")
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    exported = jax.export.export(jax.jit(run), platforms=["cuda"], disabled_checks=unchecked)
    text = exported(queries, keys, values, segment_ids, douts, extras).mlir_module()
    assert text.count("custom_call @mosaic_gpu_v2") == 3
