"""The TPU kernels compiled for chips that are not here: accepted with every feature, within their memories."""

import functools
import re

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from benchmarks.tpu_bundles import CHIPS
from lmjax.compat import temporary_bytes
from lmjax.ops.attention_flash_tpu import flash_attention_tpu
from lmjax.ops.attention_mask import Mask
from lmjax.plan.topology import topology_devices


def compiled(
    chip: str,
    length: int,
    *,
    head_dim: int = 128,
    value_dim: int | None = None,
    heads: int = 8,
    kv_heads: int = 2,
    rows: int = 1,
    mask: Mask = Mask(),  # noqa: B008
    extras: tuple[str, ...] = (),
    dtype: str = "bfloat16",
    policy: str | None = None,
    **options,
):
    """Values and gradients, of packed rows."""
    pytest.importorskip("libtpu")
    sharding = SingleDeviceSharding(topology_devices(CHIPS[chip])[0])

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    row_T, per_head = functools.partial(shape, rows, length), functools.partial(shape, heads, dtype="float32")
    every = {"prefix_BT": row_T(dtype="bool"), "slopes_N": per_head(), "sinks_N": per_head()}

    def run(q, k, v, segment_ids, dout, given):
        def attend(q, k, v):
            return flash_attention_tpu(
                q, k, v, segment_ids, **given, mask=mask, scale=0.1, save_as="kept", generation=chip, **options
            )

        if policy is not None:
            kept = jax.checkpoint_policies.save_only_these_names(policy)
            attend = jax.checkpoint(attend, policy=kept)
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, pull_back(dout)

    arguments = (
        row_T(heads, head_dim),
        row_T(kv_heads, head_dim),
        row_T(kv_heads, value_dim or head_dim),
        row_T(dtype="int32"),
        row_T(heads, value_dim or head_dim),
        {name: every[name] for name in extras},
    )
    return jax.jit(run).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def kernels(program) -> list[str]:
    return sorted(re.findall(r"kernel_name\W+flash_(\w+?)\W", program.as_text())) or sorted(
        re.findall(r"%\w*?flash_(forward|dq|dkv)[\w.]* = ", program.as_text())
    )


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(Mask(window=700), marks=pytest.mark.slow),
        pytest.param(Mask(causal=False), marks=pytest.mark.proof),
    ],
    ids=str,
)
def test_every_feature_compiles_for_every_generation(chip, mask):
    program = compiled(chip, 1500, mask=mask, extras=("slopes_N", "sinks_N"), softcap=30.0)
    assert kernels(program) == ["dkv", "dq", "forward"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "value_dim", "heads", "dtype"),
    [
        (64, 64, 8, "bfloat16"),
        (80, 80, 6, "bfloat16"),
        (96, 96, 2, "bfloat16"),
        (192, 128, 2, "bfloat16"),
        (256, 256, 4, "bfloat16"),
        (256, 256, 8, "float32"),
        (128, 128, 14, "float32"),
    ],
)
def test_every_head_dim_compiles(head_dim, value_dim, heads, dtype):
    shapes = {"head_dim": head_dim, "value_dim": value_dim, "heads": heads, "dtype": dtype}
    assert kernels(compiled("v5p", 2048, **shapes, extras=("prefix_BT",))) == ["dkv", "dq", "forward"]


@pytest.mark.proof
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, "bfloat16"), (256, "bfloat16"), (256, "float32")])
def test_each_generations_tiles_fit_its_memory(chip, head_dim, dtype):
    program = compiled(chip, 8192, head_dim=head_dim, dtype=dtype, extras=("slopes_N",), softcap=30.0)
    assert kernels(program) == ["dkv", "dq", "forward"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "forwards"), [("kept", 1), ("something else", 2)])
def test_saved_by_name_the_forward_kernel_does_not_run_again(name, forwards):
    assert kernels(compiled("v5p", 512, policy=name)).count("forward") == forwards


@pytest.mark.proof
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(("length", "head_dim"), [(4096, 128), (32_768, 128), (131_072, 128), (131_072, 256)])
def test_long_rows_need_memory_in_proportion(chip, length, head_dim):
    program = compiled(chip, length, head_dim=head_dim)
    arrays = re.findall(r"\w\[([\d,]+)\]", program.as_text())
    assert not [sizes for sizes in arrays if sum(int(size) >= length for size in sizes.split(",")) >= 2]
    rows_in_bytes = 2 * length * head_dim * (8 + 2 + 2 + 8)
    assert temporary_bytes(program) < 3 * rows_in_bytes


@pytest.mark.proof
def test_more_rows_than_scalar_memory_has_steps_for_compile():
    assert "while" in compiled("v5p", 131_072, rows=4, heads=2).as_text()
