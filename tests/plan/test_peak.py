"""What lives at the peak of a program, read from the compiler's dump."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from lmjax.compat import temporary_bytes
from lmjax.plan.peak import compile_with_peak
from lmjax.plan.topology import topology_devices

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@pytest.mark.parametrize(
    ("platform", "topology"), [("cpu", "cpu:1"), pytest.param("tpu", "v5p:2x2x1", marks=needs_libtpu)]
)
def test_what_lives_at_the_peak_is_named_with_its_size(platform, topology, tmp_path):
    n = 4096
    square = jax.ShapeDtypeStruct((n, n), "float32", sharding=SingleDeviceSharding(topology_devices(topology)[0]))

    def run(x):
        with jax.named_scope("first"):
            y = jnp.sort(x @ x, 0)
        with jax.named_scope("second"):
            z = jnp.sort(y @ x, 1)
        return y @ z

    lowered = jax.jit(run).trace(square).lower(lowering_platforms=(platform,))
    compiled, arrays = compile_with_peak(lowered, tmp_path)
    large = [array for array in arrays if array.bytes == 4 * n**2]
    needed = compiled.memory_analysis()
    assert needed is not None
    total = needed.argument_size_in_bytes + needed.output_size_in_bytes + temporary_bytes(compiled)
    listed = sum(array.bytes for array in arrays)
    assert 0.8 * total < listed < 1.001 * total  # on TPU instructions have memory of their own besides
    assert {array.type for array in large} == {f"f32[{n},{n}]"}
    scopes = " ".join(array.scope for array in large)
    assert "x" in scopes.split()
    assert "jit(run)/" in scopes
    assert [array.bytes for array in arrays] == sorted((array.bytes for array in arrays), reverse=True)
