"""What validates a kernel on a machine, and the machine's record of it."""

import dataclasses
import functools

import numpy as np
import pytest

from lmjax.hardware import CPU, Hardware
from lmjax.ops import attention_validation
from lmjax.ops.attention_chunked import chunked_attention
from lmjax.ops.attention_kernels import Wanted, choose_kernel, wanted_features
from lmjax.ops.attention_mask import Mask
from lmjax.ops.attention_validation import TOLERANCE, Check, Outcome, checks, is_recorded, outcome, record

HOPPER = Hardware("gpu", "hopper")


@pytest.fixture(autouse=True)
def _small_and_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(attention_validation, "LENGTH", 150)
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path))


def check_of(name: str, head_dim: int = 128) -> Check:
    dims = head_dim, head_dim
    (found,) = (check for check in checks(frozenset({"bfloat16"})) if check.name == name and check.dims == dims)
    return found


@pytest.mark.fast
def test_every_feature_is_checked_alone_and_with_every_head_dim_and_dtype():
    found = list(checks(frozenset({"float32", "bfloat16", "float16"})))
    assert {check.dtype for check in found} == {"bfloat16", "float16"}
    for dtype in ("bfloat16", "float16"):
        of_dtype = [check for check in found if check.dtype == dtype]
        assert {check.dims[0] for check in of_dtype} == {64, 80, 96, 112, 128, 192, 256}
        assert (192, 128) in {check.dims for check in of_dtype}
        alone = {check.arguments for check in of_dtype if len(check.arguments) == 1}
        assert alone == {frozenset({name}) for name in ("segments", "prefix", "alibi", "sinks", "softcap")}
        assert {check.mask.causal for check in of_dtype} == {True, False}
        assert any(check.mask.window for check in of_dtype)


@pytest.mark.parametrize(("name", "head_dim"), [("causal", 128), ("window", 128), ("prefix and all", 80)])
def test_a_right_kernel_agrees(name, head_dim):
    found = outcome(chunked_attention, check_of(name, head_dim))
    assert found.agrees
    assert len(found.ratios) == 4
    assert min(found.ratios) > 0.5


@pytest.mark.parametrize("name", ["segments", "prefix", "alibi", "sinks", "softcap", "window", "bidirectional"])
def test_a_kernel_that_ignores_what_is_asked_for_does_not(name):
    ignored = {"prefix": "prefix_BT", "alibi": "slopes_N", "sinks": "sinks_N", "softcap": "softcap"}.get(name)

    def wrong(q, k, v, segment_ids, *, mask, **arguments):
        arguments.pop(ignored, None)
        segment_ids = None if name == "segments" else segment_ids
        return chunked_attention(q, k, v, segment_ids, mask=Mask(), **arguments)

    check = check_of(name)
    assert outcome(chunked_attention, check).agrees
    assert max(outcome(wrong, check).ratios) > 2 * TOLERANCE


@pytest.mark.fast
def test_nan_does_not_agree():
    check = check_of("causal")
    assert Outcome(check, (1.0, 1.0, 1.0, 1.5)).agrees
    assert not Outcome(check, (1.0, 1.0, 1.0, float(np.nan))).agrees
    assert not Outcome(check, (1.0, 1.6, 1.0, 1.0)).agrees


@pytest.mark.fast
def test_auto_takes_a_kernel_that_is_recorded_for_this_hardware_code_and_jax_in_a_run_of_one_process(monkeypatch):
    features = wanted_features(Mask(), segments=True)
    wanted = Wanted(features=features, hardware=HOPPER, length=8192, head_dim=128, value_dim=128, dtype="bfloat16")
    choose = functools.partial(choose_kernel, "auto", wanted)
    assert choose().name == "chunked"
    assert "lmjax info --validate-kernels" in choose().why
    agreed = [check_of("causal"), check_of("prefix and all", 80)]
    file = record("flash_hopper", CPU, agreed)
    assert choose().name == "chunked"
    record("flash_hopper", HOPPER, agreed)
    assert choose().name == "flash_hopper"
    for changes, name in (
        ({"head_dim": 80, "value_dim": 80}, "flash_hopper"),
        ({"head_dim": 96, "value_dim": 96}, "chunked"),
        ({"head_dim": 128, "value_dim": 80}, "chunked"),
        ({"dtype": "float16"}, "chunked"),
    ):
        assert choose_kernel("auto", dataclasses.replace(wanted, **changes)).name == name, changes
    assert is_recorded("flash_hopper", CPU, "bfloat16", 128, 128)
    assert not is_recorded("flash_tpu", HOPPER, "bfloat16", 128, 128)
    with monkeypatch.context() as several:
        several.setattr(attention_validation, "coordination_client", object)
        assert choose().name == "chunked"
    with monkeypatch.context() as other:
        other.setattr(attention_validation, "_versions", lambda: {"jax": "another"})
        assert choose().name == "chunked"
    assert choose().name == "flash_hopper"
    file.write_text("{")
    assert choose().name == "chunked"
