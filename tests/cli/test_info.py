"""``lmjax info``."""

import json

import jax
import pytest

from lmjax.cli.info import info
from lmjax.ops.attention_kernels import FEATURES, KERNELS

pytestmark = pytest.mark.fast


def test_json_has_versions_devices_and_every_kernel(capsys):
    info(as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["jax"] == jax.__version__
    assert found["devices"] == [{"platform": "cpu", "kind": "cpu", "count": 8}]
    assert [kernel["kernel"] for kernel in found["kernels"]] == list(KERNELS)


def test_tables_show_the_same(capsys):
    info()
    shown = capsys.readouterr().out
    assert all(word in shown for word in (jax.__version__, "cpu", *KERNELS))


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
