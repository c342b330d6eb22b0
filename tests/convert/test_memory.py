"""Import and export of a model that is several times the memory that they are allowed."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lmjax.convert.tensors import open_tensors
from tests.convert.large_model import PASSED, large_config, write_model

ROOT = Path(__file__).parent.parent.parent
SIZES = {
    "llama": (6_000_000_000, 1_000_000_000, 1_300_000_000),
    "mixtral": (2_500_000_000, 700_000_000, 850_000_000),
    "dbrx": (2_500_000_000, 700_000_000, 850_000_000),
}
"""Bytes, by family: of the model's files, of the budget, and of anonymous memory at which a process is ended (the
budget and the largest tensor)."""


def convert(direction: str, source: Path, out: Path, budget: int, limit: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.convert.convert_under_limit", direction, str(source), str(out)]
    return subprocess.run([*command, str(budget), str(limit)], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZES)
def test_memory_stays_within_the_budget_whatever_the_size_of_the_model(tmp_path, family):
    size, budget, limit = SIZES[family]
    needed, free = 3.2 * size, shutil.disk_usage(tmp_path).free
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of disk, and {free / 1e9:.0f} GB are free")
    source, ours, exported = (tmp_path / name for name in ("source", "ours", "exported"))
    write_model(source, large_config(family, size), family=family)
    try:
        for direction, before, after in (("import", source, ours), ("export", ours, exported)):
            done = convert(direction, before, after, budget, limit)
            assert done.returncode == 0, f"{direction} ended with {done.returncode}: {done.stderr[-2000:]}"
        theirs, again = open_tensors(source), open_tensors(exported)
        assert theirs.infos.keys() == again.infos.keys()
        for name in theirs.infos:
            assert np.array_equal(theirs.read(name), again.read(name)), name
        # The same process with less than it takes is ended, so that the limit is one.
        shutil.rmtree(exported)
        assert convert("export", ours, exported, budget, 100_000_000).returncode == PASSED
        assert not exported.exists()
    finally:
        for path in (source, ours, exported):
            shutil.rmtree(path, ignore_errors=True)
