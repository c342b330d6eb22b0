"""Flags of the compiler: those of the hardware, those asked for, and those that the compiler does not know."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lmjax import xla_flags
from lmjax.errors import InputError
from lmjax.hardware import CPU, DEVICES, Hardware
from lmjax.xla_flags import FLAGS, Flag, compile_with_flags, flags_for

pytestmark = pytest.mark.fast

HOPPER = Hardware("gpu", "hopper")
RECORD = Path(__file__).parent.parent / "benchmarks" / "results" / "xla_flags.jsonl"


def flag(name: str, value: bool = True) -> Flag:
    return Flag(name, value, frozenset({"cpu"}), "to see what becomes of it", "this test")


@pytest.fixture
def lowered() -> jax.stages.Lowered:
    return jax.jit(lambda x: x + 1).lower(jnp.ones(3))


def test_each_has_a_reason_a_source_and_hardware_that_there_is():
    known = {str(device.hardware) for device in DEVICES.values()} | {"gpu", "tpu"}
    assert FLAGS
    for each in FLAGS:
        assert each.reason.endswith(".")
        assert each.source
        assert each.hardware
        assert each.hardware <= known


def test_a_name_is_once_for_a_kind_of_hardware():
    for device in DEVICES.values():
        names = [each.name for each in FLAGS if device.hardware.is_one_of(each.hardware)]
        assert len(names) == len(set(names))


def test_what_is_asked_for_comes_over_the_table_and_null_leaves_out():
    table = flags_for(HOPPER, {})
    name = next(iter(table))
    assert flags_for(HOPPER, {name: "other", "xla_more": 3}) == table | {name: "other", "xla_more": 3}
    assert flags_for(HOPPER, {name: None}) == {other: value for other, value in table.items() if other != name}
    assert flags_for(CPU, {}) == {}


def test_leaving_out_what_is_not_there_is_refused():
    with pytest.raises(
        InputError, match="xla_none is null, which leaves it out, but for gpu hopper there are only xla"
    ):
        flags_for(HOPPER, {"xla_none": None})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("xla_tpu_scoped_vmem_limit_kib", "is of the compiler for tpu, and has no effect on gpu hopper"),
        ("xla_cpu_enable_fast_math", "is of the compiler for cpu, and has no effect on gpu hopper"),
        ("xla_force_host_platform_device_count", "has no effect on a compile"),
    ],
)
def test_one_without_effect_is_refused(name: str, said: str):
    with pytest.raises(InputError, match=f"{name} {said}"):
        flags_for(HOPPER, {name: 1})


def test_one_of_the_table_that_the_compiler_does_not_know_is_told_and_left_out(lowered, monkeypatch):
    monkeypatch.setattr(xla_flags, "FLAGS", (flag("xla_cpu_enable_fast_math"), flag("xla_gone")))
    built = compile_with_flags(lowered, CPU, {})
    assert built.flags == {"xla_cpu_enable_fast_math": True}
    assert built.unknown == ("xla_gone",)
    assert built.compiled(jnp.ones(3)).tolist() == [2, 2, 2]


def test_one_that_was_asked_for_is_refused_if_the_compiler_does_not_know_it(lowered):
    with pytest.raises(InputError, match="refuses xla_gone=True: .*No such compile option"):
        compile_with_flags(lowered, CPU, {"xla_gone": True})


def test_a_value_that_the_compiler_does_not_take_is_refused(lowered):
    with pytest.raises(InputError, match="refuses xla_cpu_enable_fast_math=many: .*not a valid bool"):
        compile_with_flags(lowered, CPU, {"xla_cpu_enable_fast_math": "many"})


def test_an_error_about_something_else_is_not_taken_for_one(lowered, monkeypatch):
    def fails(**_):
        raise jax.errors.JaxRuntimeError("INTERNAL: of another kind")

    monkeypatch.setattr(lowered, "compile", fails, raising=False)
    with pytest.raises(jax.errors.JaxRuntimeError, match="of another kind"):
        compile_with_flags(lowered, CPU, {"xla_cpu_enable_fast_math": True})


def test_each_is_known_to_the_compiler_of_its_hardware_and_changes_the_program():
    """By what benchmarks/xla_flags.py recorded."""
    rows = [json.loads(line) for line in RECORD.read_text().splitlines()]
    plain = [row for row in rows if not row["flags"]]
    assert {"tpu v5e", "tpu v5p", "tpu v6e", "gpu hopper"} <= {row["hardware"] for row in plain}
    assert not any(row["changes_program"] for row in plain)
    for flag in FLAGS:
        tried = [row for row in rows if row["flags"] == {flag.name: flag.value}]
        tried = [row for row in tried if {row["hardware"], row["hardware"].split()[0]} & flag.hardware]
        assert tried
        assert all(row["changes_program"] for row in tried)
