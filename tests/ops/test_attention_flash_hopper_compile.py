"""The Hopper kernels compiled to machine code for an H200 that is not here, with every combination of features."""

import functools
import itertools
import re

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from lmjax.compat import temporary_bytes
from lmjax.ops.attention_flash_hopper import flash_attention_hopper
from lmjax.ops.attention_mask import Mask
from lmjax.plan.topology import topology_devices

pytestmark = pytest.mark.proof

EXTRAS = ("segment_ids_BT", "prefix_BT", "slopes_N", "sinks_N", "softcap")


def compiled(
    length: int,
    *,
    head_dim: int = 128,
    value_dim: int | None = None,
    mask: Mask = Mask(),  # noqa: B008
    extras: tuple[str, ...] = (),
    dtype: str = "bfloat16",
):
    """Values and gradients."""
    pytest.importorskip("jax_plugins.xla_cuda13")
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(topology_devices("h200:1")[0]))
    every = {
        "segment_ids_BT": shape((1, length), "int32"),
        "prefix_BT": shape((1, length), "bool"),
        "slopes_N": shape((8,), "float32"),
        "sinks_N": shape((8,), "float32"),
    }
    softcap = 30.0 if "softcap" in extras else None

    def run(q, k, v, dout, given):
        attend = functools.partial(
            flash_attention_hopper, **{"segment_ids_BT": None, **given}, mask=mask, scale=0.1, softcap=softcap
        )
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, pull_back(dout)

    dims = head_dim, head_dim, value_dim or head_dim, value_dim or head_dim
    heads = zip((8, 2, 2, 8), dims, strict=True)
    inputs = [shape((1, length, number, dim), dtype) for number, dim in heads]
    given = {name: every[name] for name in extras if name in every}
    return jax.jit(run).trace(*inputs, given).lower(lowering_platforms=("cuda",)).compile()


def kernels(program) -> list[str]:
    return sorted(re.findall(r'"mosaic_gpu_v2"[^\n]*op_name="[^"\n]*flash_(\w+)/', program.as_text()))


def combinations() -> list[tuple[Mask, tuple[str, ...]]]:
    masks = Mask(), Mask(window=700), Mask(causal=False)
    subsets = [names for size in range(6) for names in itertools.combinations(EXTRAS, size)]
    return [(mask, names) for mask in masks for names in subsets if "prefix_BT" not in names or mask == Mask()]


@pytest.mark.parametrize(("mask", "extras"), combinations(), ids=str)
def test_every_combination_of_features_compiles(mask, extras):
    assert kernels(compiled(1500, mask=mask, extras=extras)) == ["dkv", "dq", "forward"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("head_dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
)
def test_every_head_dim_compiles(head_dim, value_dim, dtype):
    shapes = {"head_dim": head_dim, "value_dim": value_dim, "dtype": dtype}
    program = compiled(2048, **shapes, extras=("segment_ids_BT", "softcap"))
    assert kernels(program) == ["dkv", "dq", "forward"]


@pytest.mark.parametrize("length", [4096, 32_768, 131_072])
def test_long_rows_need_memory_in_proportion(length):
    inputs = 2 * length * (2 * 8 + 2 * 2) * 128  # queries, keys, values and the gradient of the result in bfloat16
    program = compiled(length, extras=("segment_ids_BT",))
    assert temporary_bytes(program) < inputs
