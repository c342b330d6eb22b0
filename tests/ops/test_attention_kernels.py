"""The table of kernels: what auto takes where, what is refused and how, and that the table is what info shows."""

import dataclasses
import re
from typing import get_args

import pytest

from lmjax.errors import InputError
from lmjax.hardware import DEVICES, PLATFORMS, Hardware
from lmjax.ops.attention_kernels import FEATURES, KERNELS, Wanted, choose_kernel, wanted_features
from lmjax.ops.attention_mask import Mask
from lmjax.train.config import AttentionKernel

pytestmark = pytest.mark.fast

MASK = Mask(window=5)
V5P, HOPPER, CPU = Hardware("tpu", "v5p"), Hardware("gpu", "hopper"), Hardware("cpu")
PACKED = wanted_features(MASK, segments=True)


def wanted(features=PACKED, hardware=V5P, length=8192, head_dim=128, value_dim=None, dtype="bfloat16") -> Wanted:
    return Wanted(
        features=frozenset(features),
        hardware=hardware,
        length=length,
        head_dim=head_dim,
        value_dim=value_dim or head_dim,
        dtype=dtype,
    )


@pytest.mark.parametrize(
    ("hardware", "length", "name"),
    [
        (CPU, 1024, "reference"),
        (CPU, 1025, "chunked"),
        (HOPPER, 1024, "reference"),
        (HOPPER, 8192, "chunked"),
        (V5P, 256, "splash"),
        (V5P, 8192, "splash"),
        (V5P, 100, "flash_tpu"),
        (V5P, 8200, "flash_tpu"),
        (Hardware("tpu"), 100, "reference"),
        (Hardware("tpu", "v3"), 8200, "chunked"),
    ],
    ids=str,
)
def test_auto_takes_the_kernel_for_the_hardware_and_length(hardware, length, name):
    choice = choose_kernel("auto", wanted(hardware=hardware, length=length))
    assert choice.name == name
    assert f"{length} positions on {hardware}" in choice.why


@pytest.mark.parametrize(
    ("kernel", "changes", "message"),
    [
        ("flash", {"hardware": CPU}, "'flash' is not known; choose one of auto, reference, chunked"),
        (
            "splash",
            {"hardware": HOPPER},
            "'splash' runs on tpu only, not on gpu hopper; those that can do this are auto, reference, chunked",
        ),
        (
            "splash",
            {"length": 200},
            "'splash' takes rows of a multiple of 128 positions, not 200; those that can do this are auto, reference,",
        ),
        (
            "flash_tpu",
            {"hardware": Hardware("tpu", "v3")},
            "'flash_tpu' runs on tpu 7x, tpu v4, tpu v5e, tpu v5p, tpu v6e only, not on tpu v3; those that can",
        ),
        ("flash_tpu", {"dtype": "float16"}, "'flash_tpu' takes bfloat16, float32, not float16; those that can do this"),
        (
            "flash_tpu",
            {"head_dim": 320},
            "'flash_tpu' takes head_dim 8 to 256 in steps of 8, not 320; those that can do this are auto, reference",
        ),
        ("flash_tpu", {"head_dim": 192, "value_dim": 20}, "head_dim 8 to 256 in steps of 8, not 192 and 20; those"),
        (
            "cudnn",
            {"hardware": HOPPER, "features": {"causal", "softcap", "segments"}},
            "'cudnn' does not have segments, softcap; those that can do this are auto, reference, chunked",
        ),
        (
            "cudnn",
            {"hardware": HOPPER, "features": {"causal"}, "head_dim": 128, "value_dim": 64},
            "'cudnn' takes values as long as keys, not 64 and 128; those that can do this are auto, reference, chunked",
        ),
    ],
)
def test_a_kernel_that_cannot_is_refused_with_those_that_can(kernel, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        choose_kernel(kernel, wanted(**changes))


@pytest.mark.parametrize("feature", ["prefix", "alibi", "sinks"])
def test_what_splash_lacks_is_left_to_our_kernel_and_the_log_says_how_that_was_validated(feature):
    every = wanted_features(Mask(), segments=True, softcap=True, **{feature: True})
    assert every == {"causal", "segments", "softcap", feature}
    choice = choose_kernel("auto", wanted(every))
    assert choice.name == "flash_tpu"
    assert f"splash does not have {feature}" in choice.why
    assert "interpreted against the reference, compiled for each generation; run on none" in choice.why
    message = f"'splash' does not have {feature}; those that can do this are auto, reference, chunked"
    with pytest.raises(InputError, match=re.escape(message)):
        choose_kernel("splash", wanted(every))
    assert choose_kernel("splash", wanted(every - {feature})).name == "splash"


def test_the_hopper_kernel_has_everything_and_is_taken_only_by_name():
    every = wanted(FEATURES - {"bidirectional"}, hardware=HOPPER)
    choice = choose_kernel("auto", every)
    assert choice.name == "chunked"
    assert "flash_hopper was not validated on this hardware" in choice.why
    assert choose_kernel("flash_hopper", every).name == "flash_hopper"
    with pytest.raises(InputError, match="'flash_hopper' runs on gpu hopper only, not on gpu ampere"):
        choose_kernel("flash_hopper", wanted(hardware=Hardware("gpu", "ampere")))


def test_a_kernel_that_was_not_validated_is_taken_only_by_name(monkeypatch):
    monkeypatch.setitem(KERNELS, "flash_tpu", dataclasses.replace(KERNELS["flash_tpu"], is_validated=False))
    choice = choose_kernel("auto", wanted({"causal", "alibi"}))
    assert choice.name == "chunked"
    assert "flash_tpu was not validated on this hardware" in choice.why
    assert choose_kernel("flash_tpu", wanted({"causal", "alibi"})) == ("flash_tpu", "named in the configuration")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "cudnn"),
        ({"features": wanted_features(Mask(window=9))}, "cudnn"),
        ({"features": wanted_features(Mask(causal=False))}, "cudnn"),
        ({"dtype": "float32"}, "chunked"),
        ({"features": wanted_features(Mask(), segments=True)}, "chunked"),
        ({"features": wanted_features(Mask(), softcap=True)}, "chunked"),
        ({"head_dim": 256}, "chunked"),
        ({"length": 8191}, "chunked"),
        ({"hardware": Hardware("gpu")}, "chunked"),
    ],
)
def test_cudnn_is_taken_where_it_has_everything_that_is_wanted(changes, name):
    assert choose_kernel("auto", wanted(**({"features": {"causal"}, "hardware": HOPPER} | changes))).name == name


def test_features_are_those_of_the_mask_and_of_what_is_used():
    assert wanted_features(Mask()) == {"causal"}
    assert wanted_features(Mask(causal=False)) == {"bidirectional"}
    every = wanted_features(MASK, segments=True, prefix=True, softcap=True, alibi=True, sinks=True)
    assert every == {"causal", "window", "segments", "prefix", "softcap", "alibi", "sinks"}
    for name in ("reference", "chunked", "flash_tpu"):
        assert every | {"bidirectional"} == KERNELS[name].features == FEATURES


def test_a_named_kernel_is_taken():
    assert choose_kernel("chunked", wanted(length=8)).name == "chunked"


def test_the_table_names_hardware_that_there_is():
    known = {str(device.hardware) for device in DEVICES.values()} | set(PLATFORMS)
    assert known >= KERNELS["flash_tpu"].hardware
    for kernel in KERNELS.values():
        assert kernel.hardware <= known
        assert kernel.features <= FEATURES


def test_a_config_may_name_every_kernel():
    assert set(get_args(AttentionKernel)) == {"auto", *KERNELS}
