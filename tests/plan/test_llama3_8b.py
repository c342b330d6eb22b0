"""The step of a model that is trained for real, on the pod that it is trained on."""

import pytest

GIB = 2**30


@pytest.mark.proof
def test_llama3_8b_fits_64_chips_with_less_than_10_gib_of_temporaries_and_nothing_quadratic():
    pytest.importorskip("libtpu")
    from benchmarks.compile_llama3_8b import compile_llama3_8b, quadratic_arrays

    step = compile_llama3_8b()
    assert quadratic_arrays(step) == []
    assert "splash" in step.text
    assert step.temp_bytes < 10 * GIB
    # 8.03 G parameters with two moments in float32, over 64 chips, and the batch.
    assert step.argument_bytes < 1.001 * 3 * 4 * 8_030_261_248 / 64 + 4 * 5 * 4 * 8192
