"""Tile sizes by TPU generation: they reach the kernel, and are those that the tuner's recorded result says."""

import functools
import json
from pathlib import Path

import jax
import pytest

from benchmarks.attention_tiles import PARTS, TILES, Bundles, best, compiled
from lmjax.hardware import Hardware
from lmjax.ops import attention_flash_tpu_tiles
from lmjax.ops.attention_flash_tpu_tiles import TILINGS, Tiling, tiling_of
from lmjax.ops.attention_kernels import KERNELS
from lmjax.ops.attention_mask import Mask

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "attention_tiles.jsonl"


def test_the_table_is_the_recorded_result_of_the_tuner():
    *rows, last = map(json.loads, RESULT.read_text().splitlines())
    chosen = {chip: {int(dim): Tiling(*sizes) for dim, sizes in dims.items()} for chip, dims in last["best"].items()}
    assert chosen == TILINGS
    assert best(rows) == last["best"]
    cases = {(row["chip"], row["head_dim"], row["tile"], row["part"]) for row in rows}
    parts_of = [(tile, part) for tile in TILES for part in PARTS if part <= tile]
    assert cases == {(chip, dim, *sizes) for chip, dims in TILINGS.items() for dim in dims for sizes in parts_of}


@pytest.mark.fast
def test_the_best_has_the_lowest_product_and_was_compiled():
    def row(tile, causal, documents):
        counted = {"causal_kilobundles": causal, "documents_kilobundles": documents}
        return {"chip": "v4", "head_dim": 64, "tile": tile, "part": 128} | counted

    refused = {"chip": "v4", "head_dim": 64, "tile": 2048, "part": 128, "error": "vmem"}
    assert best([row(256, 10, 3), row(512, 7, 4), row(1024, 6, 9), refused]) == {"v4": {"64": [512, 128]}}


@pytest.mark.fast
def test_bundles_of_a_row_are_those_of_its_steps():
    bundles = Bundles(masked=1000, unmasked=100, edges=10, step=1)
    assert bundles.of_row(1, 4096, by_query=True) == 2 * 1000 + 100 + 2 * 10 + 3
    assert bundles.of_row(8, 1024, by_query=False) == 8 * (1000 + 10 + 1)


@pytest.mark.fast
def test_regions_of_a_program_are_told_apart():
    def line(address, marks=""):
        return f"  {address:#x}   : > {{ %s1 = smov 0 }} {marks}"

    lines = [
        line(0, "/* Start region 1 */"),
        line(10, "/* Start region 2 :: Start region 3 */"),  # of the grid, and of what it begins with
        line(13, "/* End region 3 */"),
        line(20, "/* Start region 4 */"),
        line(79, "/* End region 4 */"),  # a tile's beginning
        line(100, "/* Start region 5 */"),
        line(399, "/* End region 5 :: Start/End empty region 9 */"),
        line(410, "/* Start region 6 */"),
        line(609, "/* End region 6 */"),
        line(1009, "/* End region 2 */"),
        line(1015, "/* End region 1 */"),
    ]
    assert Bundles.read(lines) == Bundles(masked=300, unmasked=200, edges=60, step=1016 - 560)


@pytest.mark.fast
def test_tiles_go_by_the_longest_head_up_to_that_of_an_entry(monkeypatch):
    small, large = Tiling(128, 128), Tiling(256, 128)
    monkeypatch.setitem(attention_flash_tpu_tiles.TILINGS, "v6e", {64: small, 256: large})
    assert [tiling_of("v6e", dim) for dim in (8, 64, 80, 256)] == [small, small, large, large]


def test_a_generation_has_its_own_tiles(monkeypatch):
    """What is traced for it has as many steps as its tiles make pairs."""
    monkeypatch.setitem(TILINGS, "v6e", {256: Tiling(128, 128)})
    monkeypatch.setitem(TILINGS, "v5p", {256: Tiling(256, 128)})
    x, row = jax.ShapeDtypeStruct((1, 512, 1, 64), "bfloat16"), jax.ShapeDtypeStruct((1, 512), "int32")
    for generation, steps in (("v6e", 10), ("v5p", 3)):
        kernel = KERNELS["flash_tpu"]
        options = kernel.options_on(Hardware("tpu", generation))
        find = functools.partial(kernel.visits, mask=Mask(), dims=64, **options)
        attend = functools.partial(kernel.attend, mask=Mask(), scale=1.0, **options)
        visits = jax.eval_shape(find, row, None)
        assert visits.by_query.tiles_W.size == steps
        jax.eval_shape(lambda *inputs, attend=attend: attend(*inputs[:4], visits=inputs[4]), x, x, x, row, visits)


@pytest.mark.slow
def test_what_a_compile_schedules_is_read():
    pytest.importorskip("libtpu")
    found = compiled(("v5e", 64, 256, 128), ("forward",))["forward"]
    assert found["masked"] > found["unmasked"] > 500
    assert found["edges"] > 100
    assert 2**19 < found["vmem"] < 2**24


@pytest.mark.slow
def test_what_the_compiler_refuses_has_its_reason():
    pytest.importorskip("libtpu")
    assert "vmem" in compiled(("v5e", 256, 2048, 512), ("forward",))["error"]
