"""What lives at the peak of a program, read from the compiler's dump."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from lmjax.compat import temporary_bytes
from lmjax.plan.peak import PeakArray, arrays_of_dump, dump_options, read_peak
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
    compiled = lowered.compile(compiler_options=dump_options(tmp_path))
    arrays = arrays_of_dump(tmp_path)
    large = [array for array in arrays if array.bytes == 4 * n**2]
    needed = compiled.memory_analysis()
    assert needed is not None
    total = needed.argument_size_in_bytes + needed.output_size_in_bytes + temporary_bytes(compiled)
    listed = sum(array.bytes for array in arrays)
    assert 0.8 * total < listed < 1.001 * total  # there are gaps between arrays, large ones in a small program
    assert f"f32[{n},{n}]" in {array.type for array in large}
    scopes = " ".join(array.scope for array in large)
    assert "x" in scopes.split()
    assert "jit(run)/" in scopes
    assert [array.bytes for array in arrays] == sorted((array.bytes for array in arrays), reverse=True)


ASSIGNMENT = """
allocation 0: size 100, parameter 0, shape |f32[25]| at ShapeIndex {}:
 value: <0 x @0> (size=100,offset=0): f32[25]{0:T(128)}
allocation 1: size 300, preallocated-temp:
 value: <1 first @0> (size=100,offset=0): f32[25]{0:T(128)}
 value: <2 large @0> (size=200,offset=100): bf16[10,10]{1,0}
 value: <3 loop{1} (phi) @0> (size=100,offset=0): f32[25]{0}
 value: <4 later @0> (size=150,offset=100): f32[37]{0}
 value: <5 near @1> (size=1000,offset=0): f32[250]{0:T(128)S(1)}
 value: <6 updated @0> (size=100,offset=0): f32[25]{0}
"""
LIVE_RANGES = """HloLiveRange (max 9):
  BufferLiveRange:
    x{}:0-9
    first{}:1-3
    loop{1}:3-8
    large{}:4-5
    later{}:6-7
    near{}:0-9
    updated{}:7-8
  Live ranges at 6 (peak):
    later{}: 150 bytes (cumulative: 150 bytes)
"""
PROGRAM = """
ENTRY %main (x: f32[25]) -> f32[25] {
  %large = bf16[10,10]{1,0} dot(%x, %x), metadata={op_name="jit(step)/mlp/dot"}
  ROOT %updated = f32[25]{0} add(%x, %x), metadata={op_name="jit(step)/state[\\'update\\']"}
}
"""


@pytest.mark.fast
def test_what_shares_a_place_is_one_array_and_the_peak_is_where_most_memory_is_taken():
    """The compiler's own word on the peak is another: on TPU it is wrong."""
    assert read_peak(ASSIGNMENT, LIVE_RANGES, PROGRAM) == [
        PeakArray(200, "large", "bf16[10,10]", "jit(step)/mlp/dot"),
        PeakArray(100, "x", "f32[25]", ""),
        PeakArray(100, "updated", "f32[25]", "jit(step)/state['update']"),
    ]
