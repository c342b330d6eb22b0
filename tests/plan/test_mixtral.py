"""The step of a mixture of experts, on a pod slice that is not here."""

import pytest

GIB = 2**30


@pytest.mark.proof
def test_mixtral_8x7b_fits_128_chips_with_its_experts_over_8_of_them_and_nothing_by_experts_and_tokens():
    pytest.importorskip("libtpu")
    from benchmarks.compile_moe import arrays_too_large, compile_mixtral

    step = compile_mixtral()
    assert arrays_too_large(step) == []
    assert "splash" in step.text
    assert step.temp_bytes < 12 * GIB
    # 46.7 G parameters with two moments in float32, over 128 chips, and the batch.
    assert step.argument_bytes < 1.001 * 3 * 4 * 46_702_792_704 / 128 + 4 * 5 * 4 * 4096
    # Tokens are gathered once along the experts and summed back once; no slots are exchanged.
    assert "all-to-all" not in step.collectives
    assert {"all-gather", "reduce-scatter"} <= set(step.collectives)
