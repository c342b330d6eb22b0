"""Scaled frequencies equal those of transformers' ROPE_INIT_FUNCTIONS, and are chosen row by row."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.errors import InputError
from lmjax.nn.position import Rope
from lmjax.nn.rope_scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
    powers,
)

MAX_LENGTH = 4096


def found_in(scaling: RopeScaling | None, theta: float, width: int, length: int) -> tuple[np.ndarray, float]:
    """The frequencies and the factor in a row of ``length`` positions."""
    assert scaling is not None
    frequencies, factor = scaling.frequencies(theta, width, jnp.full((1, 1, 1), length))
    return np.asarray(frequencies, np.float64).reshape(-1), float(np.asarray(factor).reshape(()))


def expected_of(kind: str, theta: float, width: int, length: int, positions: int, **parameters):
    """The same of transformers; ``positions`` is its ``max_position_embeddings``."""
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=4 * width,
        num_attention_heads=4,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **parameters},
    )
    frequencies, factor = rope_utils.ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
    return frequencies.double().numpy(), float(factor)


def assert_same(found: tuple[np.ndarray, float], expected: tuple[np.ndarray, float]) -> None:
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-6)
    assert found[1] == pytest.approx(expected[1], rel=1e-6)


def is_same(found: tuple[np.ndarray, float], expected: tuple[np.ndarray, float]) -> bool:
    return np.allclose(found[0], expected[0], rtol=1e-4) and math.isclose(found[1], expected[1], rel_tol=1e-4)


def test_linear():
    expected = expected_of("linear", 1e4, 16, 10, MAX_LENGTH, factor=8.0)
    assert_same(found_in(LinearScaling(factor=8.0), 1e4, 16, 10), expected)
    assert not is_same(found_in(LinearScaling(factor=7.0), 1e4, 16, 10), expected)


@pytest.mark.parametrize("length", [1, 64, 65, 200, 1000])
def test_dynamic(length):
    expected = expected_of("dynamic", 1e4, 16, length, 64, factor=4.0)
    assert_same(found_in(DynamicScaling(factor=4.0, original_length=64), 1e4, 16, length), expected)
    if length > 64:
        assert not is_same(found_in(DynamicScaling(factor=4.0, original_length=64), 1e4, 16, length + 9), expected)
    else:
        np.testing.assert_allclose(expected[0], powers(1e4, 16), rtol=1e-6)


@pytest.mark.parametrize(("theta", "width", "original"), [(1e4, 64, 2048), (1e6, 128, 4096), (150_000.0, 32, 64)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_fast": 16.0, "beta_slow": 2.0},
        {"attention_factor": 1.5},
        {"truncate": False},
        {"factor": 1.0},
    ],
)
def test_yarn(theta, width, original, options):
    fields = {"factor": 40.0} | options
    expected = expected_of("yarn", theta, width, 10, MAX_LENGTH, original_max_position_embeddings=original, **fields)
    assert_same(found_in(YarnScaling(original_length=original, **fields), theta, width, 10), expected)
    if fields["factor"] > 1:
        other = YarnScaling(original_length=2 * original, **fields)
        assert not is_same(found_in(other, theta, width, 10), expected)


@pytest.mark.parametrize("length", [5, 64, 65, 300])
def test_longrope(length):
    short, long = [1.0, 1.1, 1.3, 1.9], [1.5, 4.0, 20.0, 64.0]
    factor = math.sqrt(1 + math.log(MAX_LENGTH / 64) / math.log(64))
    scaling = LongRopeScaling(
        short_factors=tuple(short), long_factors=tuple(long), original_length=64, attention_factor=factor
    )
    given = {"short_factor": short, "long_factor": long, "original_max_position_embeddings": 64}
    expected = expected_of("longrope", 1e4, 8, length, MAX_LENGTH, **given)
    assert_same(found_in(scaling, 1e4, 8, length), expected)
    assert not is_same(found_in(scaling, 1e4, 8, 65 if length <= 64 else 64), expected)


@pytest.mark.parametrize(("theta", "width", "original"), [(5e5, 128, 8192), (5e5, 64, 8192), (100.0, 16, 64)])
def test_llama3(theta, width, original):
    scaling = Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=original)
    given = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": original}
    expected = expected_of("llama3", theta, width, 10, MAX_LENGTH, factor=8.0, **given)
    found = found_in(scaling, theta, width, 10)
    assert_same(found, expected)
    ratio = found[0] / powers(theta, width)
    assert ratio.max() == pytest.approx(1)
    assert ratio.min() == pytest.approx(1 / 8)
    assert ((ratio > 0.13) & (ratio < 0.99)).any()
    other = expected_of("llama3", theta, width, 10, MAX_LENGTH, factor=8.0, **(given | {"high_freq_factor": 5.0}))
    assert not is_same(found, other)


@pytest.mark.fast
def test_a_row_is_scaled_by_its_own_length():
    """Not by the longest one of the batch, with which a row's logits would depend on the other rows."""
    rope = Rope(width=8, theta=1e4, scaling=DynamicScaling(factor=4.0, original_length=4))
    short, long = np.arange(6), np.arange(6) + 20
    together = rope.rotation(jnp.asarray([short, long]))
    for row, positions in enumerate((short, long)):
        alone = rope.rotation(jnp.asarray([positions]))
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_allclose(one[row], other[0], rtol=1e-6)
    other = rope.rotation(jnp.asarray([np.append(short[:-1], 25)]))
    assert np.abs(together.cos_BTR[0, :-1] - other.cos_BTR[0, :-1]).max() > 1e-3


@pytest.mark.fast
@pytest.mark.parametrize(
    "build",
    [
        lambda: LinearScaling(factor=0.5),
        lambda: DynamicScaling(factor=2.0, original_length=0),
        lambda: YarnScaling(factor=2.0, original_length=8, beta_fast=1.0, beta_slow=2.0),
        lambda: LongRopeScaling(short_factors=(1.0, 1.0), long_factors=(1.0,), original_length=8, attention_factor=1.0),
        lambda: Llama3Scaling(factor=8.0, low_frequency_factor=4.0, high_frequency_factor=1.0, original_length=8),
    ],
)
def test_impossible_scalings_are_refused(build):
    with pytest.raises(InputError):
        build()
