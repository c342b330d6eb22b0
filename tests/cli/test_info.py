"""``lmjax info``."""

import dataclasses
import json

import jax
import pytest
import typer

from lmjax.cli.info import info
from lmjax.errors import InputError
from lmjax.hardware import CPU
from lmjax.ops import attention_validation
from lmjax.ops.attention_chunked import chunked_attention
from lmjax.ops.attention_kernels import FEATURES, KERNELS
from lmjax.xla_flags import FLAGS


@pytest.mark.fast
def test_json_has_versions_devices_and_every_kernel(capsys):
    info(as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["jax"] == jax.__version__
    assert found["devices"] == [{"platform": "cpu", "kind": "cpu", "count": 8}]
    assert [kernel["kernel"] for kernel in found["kernels"]] == list(KERNELS)


@pytest.mark.fast
def test_tables_show_the_same(capsys):
    info()
    shown = capsys.readouterr().out
    assert all(word in shown for word in (jax.__version__, "cpu", *KERNELS))


@pytest.mark.fast
def test_attention_shows_the_whole_table_and_nothing_else(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    info(attention=True)
    shown = capsys.readouterr().out
    assert all(word in shown for word in (*KERNELS, *FEATURES))
    assert jax.__version__ not in shown
    (alibi,) = (line for line in shown.splitlines() if "alibi" in line)
    assert alibi.count("yes") == sum("alibi" in kernel.features for kernel in KERNELS.values())
    assert all(kernel.validation in shown for kernel in KERNELS.values() if kernel.validation)
    info(as_json=True, attention=True)
    (found,) = json.loads(capsys.readouterr().out).values()
    assert [set(kernel["features"]) for kernel in found] == [kernel.features for kernel in KERNELS.values()]
    assert "flash_tpu" in {kernel["kernel"] for kernel in found if "tpu v5p" in kernel["hardware"]}
    assert [kernel["kernel"] for kernel in found if not kernel["taken_by_auto"]] == ["flash_hopper"]
    assert "by name only" in shown


@pytest.fixture
def of_ours_on_cpu(monkeypatch, tmp_path):
    """Puts a kernel in the place of ours for TPU, as one that runs here; its checks are few and small."""
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(attention_validation, "LENGTH", 70)
    few = [check for check in attention_validation.checks(frozenset({"bfloat16"})) if check.dims == (64, 64)]
    monkeypatch.setattr(attention_validation, "checks", lambda dtypes: few)

    def put(attend):
        kernel = dataclasses.replace(KERNELS["flash_tpu"], attend=attend, hardware=frozenset({"cpu"}))
        monkeypatch.setitem(KERNELS, "flash_tpu", kernel)

    return put


def test_a_kernel_that_agrees_on_this_machine_is_recorded_and_one_that_differs_is_not(capsys, of_ours_on_cpu):
    of_ours_on_cpu(lambda *rows, softcap, **arguments: chunked_attention(*rows, **arguments))
    with pytest.raises(typer.Exit) as stopped:
        info(validate_kernels=True)
    assert stopped.value.exit_code == 1
    assert "flash_tpu: differs" in capsys.readouterr().out
    assert not attention_validation.is_recorded("flash_tpu", CPU, "bfloat16", 64, 64)

    of_ours_on_cpu(chunked_attention)
    info(validate_kernels=True, as_json=True)
    (found,) = json.loads(capsys.readouterr().out)["validated"]
    assert found["agrees"]
    assert {row["check"] for row in found["checks"]} == {"window and all", "prefix and all"}
    assert attention_validation.is_recorded("flash_tpu", CPU, "bfloat16", 64, 64)
    info(validate_kernels=True)
    assert f"flash_tpu: agrees; recorded in {found['recorded_in']}" in capsys.readouterr().out


@pytest.mark.fast
def test_where_none_of_our_kernels_runs_there_is_nothing_to_validate():
    with pytest.raises(InputError, match="none of our kernels runs on cpu; flash_tpu, flash_hopper run on gpu hopper"):
        info(validate_kernels=True)
    with pytest.raises(InputError, match="one of them at a time"):
        info(validate_kernels=True, attention=True)


def test_flags_of_the_compilers_are_told_with_their_reasons(capsys):
    info(xla_flags=True, as_json=True)
    found = json.loads(capsys.readouterr().out)["xla_flags"]
    assert [each["name"] for each in found] == [flag.name for flag in FLAGS]
    info(xla_flags=True)
    shown = capsys.readouterr().out
    assert "tpu v6e" in shown
