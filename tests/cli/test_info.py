"""``lmjax info``."""

import json

import jax
import pytest

from lmjax.cli.info import info
from lmjax.ops.attention import KERNELS

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
