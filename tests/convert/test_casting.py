"""What is cast and transposed by blocks is what NumPy makes of it, bit for bit."""

import ml_dtypes
import numpy as np
import pytest

from lmjax.convert.casting import LINES, RUN, cast_into

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BFLOAT16, np.dtype(np.float16)]
SHAPES = [(1, 9), (4, 4), (7, 5), (LINES + 1, 2 * LINES + 3), (LINES - 2, RUN + 5), (RUN + 5, LINES + 2)]


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@pytest.mark.fast
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("wanted", [np.dtype(np.float32), BFLOAT16], ids=str)
def test_any_order_of_either_side(rng, shape, given, wanted):
    values = rng.standard_normal(shape).astype(given)
    expected = values.astype(wanted)
    for order in ("C", "F"):
        for out_order in ("C", "F"):
            out = np.empty(shape, wanted, order=out_order)
            cast_into(out, np.array(values, order=order))
            assert same(out, expected)
    out = np.empty(shape, wanted)
    cast_into(out, values[::-1, ::-1])
    assert same(out, expected[::-1, ::-1])
    assert not same(out, expected)


@pytest.mark.fast
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_dimensions_and_parts_of_arrays(rng, dtype):
    rows = rng.standard_normal((6 * 8, 37)).astype(dtype)
    heads = rows.T.reshape(37, 6, 8)
    out = np.empty(heads.shape, dtype)
    cast_into(out, heads)
    assert same(out, np.ascontiguousarray(heads))
    part = np.zeros((37, 3, 8), dtype)
    cast_into(part[1:, :, 2:7], heads[1:, ::2, 2:7])
    assert same(part[1:, :, 2:7], np.ascontiguousarray(heads[1:, ::2, 2:7]))
    assert not part[0].any()
    assert not part[:, :, 7].any()


@pytest.mark.fast
def test_halves_are_rounded_to_even():
    values = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, np.inf, -0.0, 3.4e38], np.float32)
    out = np.empty(5, BFLOAT16)
    cast_into(out, values)
    assert out.astype(np.float32).tolist() == [1.0, 1 + 2.0**-6, np.inf, -0.0, np.inf]
    assert np.signbit(out[3])
