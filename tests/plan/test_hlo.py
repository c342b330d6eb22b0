"""What is read from the text of a program: shapes and collectives, counted and measured exactly."""

import re

import pytest

from lmjax.plan.hlo import (
    ArrayShape,
    Collective,
    Sent,
    array_shapes,
    arrays_above,
    collectives,
    num_bytes,
    sent_by_axis,
)

PROGRAM = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.3.clone.1 (input: bf16[4,64,16]) -> bf16[4,16,16] {
  %input = bf16[4,64,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.62 = bf16[4,64,16]{2,1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=11, to_apply=%add
  ROOT %slice = bf16[4,16,16]{2,1,0} dynamic-slice(%all-reduce.62), dynamic_slice_sizes={4,16,16}
}

ENTRY %main (a: f32[8,16], b: bf16[4,64,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0:T(8,128)} parameter(0)
  %b = bf16[4,64,16]{2,1,0} parameter(1)
  %permute-start = (f32[8,16]{1,0}, f32[8,16]{1,0}, u32[]{:S(2)}, u32[]) collective-permute-start(%a), channel_id=5
  %permute-done = f32[8,16]{1,0} collective-permute-done(%permute-start)
  %gather = f32[32,16]{1,0} all-gather(%permute-done), channel_id=6, dimensions={0}
  %scatter = f32[2,16]{1,0} reduce-scatter(%a), channel_id=7, dimensions={0}, to_apply=%add
  %pair = (f32[8,16]{1,0}, f32[]{:T(128)}) all-reduce(%a, %zero), channel_id=8, to_apply=%add
  %other = f32[32,16]{1,0} all-gather(%a), metadata={op_name="s8[9,9] all-to-all(%a)"}
  %fused = bf16[4,16,16]{2,1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.3.clone.1
  ROOT %out = f32[8,16]{1,0} copy(%a)
}
"""


@pytest.mark.fast
def test_collectives_are_counted_by_kind_with_their_larger_side():
    assert collectives(PROGRAM) == {
        "all-gather": Collective(2, 2 * 32 * 16 * 4),
        "all-reduce": Collective(1, 8 * 16 * 4 + 4),
        "collective-permute": Collective(1, 8 * 16 * 4 + 8),
        "reduce-scatter": Collective(2, 8 * 16 * 4 + 4 * 64 * 16 * 2),
    }


@pytest.mark.fast
@pytest.mark.parametrize(
    ("groups", "count"),
    [
        ("{{0},{1}}", 0),
        ("[8,1]<=[8]", 0),
        ("{{0,1},{2,3}}", 1),
        ("[4,2]<=[8]", 1),
        ("{}", 1),
        ("mesh['a'=1,'b'=8] {'a'}", 0),
        ("mesh['a'=1,'b'=8] {'a','b'}", 1),
    ],
)
def test_within_groups_of_one_device_nothing_is_sent(groups: str, count: int):
    line = f"  %x = f32[4]{{0}} all-reduce(%a), replica_groups={groups}, to_apply=%add\n"
    assert len(collectives(f"ENTRY %main (a: f32[4]) -> f32[4] {{\n{line}")) == count


def test_a_program_without_collectives_has_none():
    assert collectives(PROGRAM.partition("%all-reduce-scatter")[0]) == {}


@pytest.mark.fast
def test_shapes_are_those_of_arrays_and_not_of_layouts_or_comments():
    assert array_shapes(PROGRAM) == {
        ArrayShape("f32", ()),
        ArrayShape("u32", ()),
        ArrayShape("f32", (8, 16)),
        ArrayShape("f32", (32, 16)),
        ArrayShape("f32", (2, 16)),
        ArrayShape("bf16", (4, 64, 16)),
        ArrayShape("bf16", (4, 16, 16)),
    }


@pytest.mark.fast
def test_an_array_is_above_where_two_of_its_dimensions_are():
    assert arrays_above(PROGRAM, 16, 64) == arrays_above(PROGRAM, 64, 16) == {ArrayShape("bf16", (4, 64, 16))}
    assert arrays_above(PROGRAM, 17, 17) == set()
    assert ArrayShape("f32", (32, 16)) in arrays_above(PROGRAM, 16, 16)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("type_", "expected"),
    [
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 30),
        ("(f32[2], pred[3]{0})", 11),
        ("s4[6]", 3),
        ("f32[]", 4),
        ("token[]", 0),
        ("f8e4m3fn[3,2]", 6),
    ],
)
def test_bytes_of_types(type_: str, expected: int):
    assert num_bytes(type_) == expected


@pytest.mark.fast
@pytest.mark.parametrize("type_", ["f32[8,16]{1,0}", "((f32[8,16]{1,0}), f32[8,16]{1,0})"])
def test_an_all_reduce_that_starts_counts_once_whichever_way_its_type_is_written(type_: str):
    text = f"""\
HloModule jit_step

ENTRY %main (a: f32[8,16]) -> f32[8,16] {{
  %a = f32[8,16]{{1,0}} parameter(0)
  %start = {type_} all-reduce-start(%a), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %done = f32[8,16]{{1,0}} all-reduce-done(%start)
}}
"""
    assert collectives(text) == {"all-reduce": Collective(1, 8 * 16 * 4)}
    assert sent_by_axis(text, MESH) == [Sent("data+fsdp+tensor", "all-reduce", 1, 2 * 7 * 8 * 16 * 4 // 8)]


LOOPS = """\
HloModule jit_step, num_partitions=8

%below (n: s32[]) -> pred[] {
  %five = s32[]{:T(128)} constant(5), metadata={op_name="jit(step)/while"}
  %n = s32[]{:T(128)} parameter(0)
  ROOT %lt = pred[]{:T(512)} compare(%n, %five), direction=LT, metadata={op_name="jit(step)/while/cond/lt"}
}

%thrice (m: s32[]) -> pred[] {
  %three = s32[] constant(3)
  %m = s32[] parameter(0)
  ROOT %less = pred[] compare(%m, %three), direction=LT
}

%inner (x: f32[8,16]) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  ROOT %sum = f32[8,16]{1,0} all-reduce(%x), replica_groups=[4,2]<=[2,2,2]T(0,2,1), to_apply=%add
}

%body (y: f32[8,16]) -> f32[8,16] {
  %y = f32[8,16]{1,0} parameter(0)
  %part = f32[4,16]{1,0} reduce-scatter(%y), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, to_apply=%add
  ROOT %again = f32[8,16]{1,0} while(%y), condition=%below, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
}

ENTRY %main (a: f32[8,16]) -> f32[32,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %looped = f32[8,16]{1,0} while(%a), condition=%below, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %moved = f32[8,16]{1,0} collective-permute(%looped), source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %alone = f32[8,16]{1,0} all-gather(%moved), replica_groups=[8,1]<=[8], dimensions={0}
  ROOT %all = f32[32,16]{1,0} all-gather(%moved), dimensions={0}, GROUPS
}
"""
MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.fast
@pytest.mark.parametrize(
    "groups",
    [
        "replica_groups=[2,4]<=[8]",
        "replica_groups={{0,1,2,3},{4,5,6,7}}",
        "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}",
        "replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2], device_ids=([2,2,2]T(1,2,0)) {'axis_0','axis_1'}",
    ],
)
@pytest.mark.parametrize("counts", ["by the compiler", "by the condition"])
def test_what_is_sent_counts_by_mesh_axis_as_often_as_its_loop_runs(groups: str, counts: str):
    size = 8 * 16 * 4
    text = LOOPS.replace("GROUPS", groups)
    if counts == "by the condition":
        text = re.sub(r', backend_config=\{"known_trip_count":\{"n":"\d+"\}\}', "", text)
        text = text.replace("condition=%below, body=%body", "condition=%thrice, body=%body")
    assert {sent.axes: sent for sent in sent_by_axis(text, MESH)} == {
        "fsdp": Sent("fsdp", "all-reduce", 15, 15 * size),  # twice the half of it
        "data": Sent("data", "reduce-scatter", 3, 3 * size // 2),
        "tensor": Sent("tensor", "collective-permute", 1, size),
        "fsdp+tensor": Sent("fsdp+tensor", "all-gather", 1, 4 * size * 3 // 4),
    }
