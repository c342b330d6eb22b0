"""Peaks by the names that JAX gives devices."""

import pytest

from lmjax.hardware import DEVICES, peak_flops

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        *((kind, known.peak_flops) for kind, known in DEVICES.items()),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", 989e12),
        ("TPU v55", None),
        ("cpu", None),
    ],
)
def test_the_longest_whole_name_that_fits_is_taken(kind: str, peak: float | None):
    assert peak_flops(kind) == peak
