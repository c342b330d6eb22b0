"""docs/conversion.md runs as it is written: real weights in, trained further, out, and transformers agrees."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lmjax.convert.families import mistral
from tests.conftest import CACHE
from tests.convert import smollm2
from tests.test_docs import ROOT, blocks, commands

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def lmjax(directory: Path, *arguments: str) -> str:
    """What the command prints in a process of its own, which has one device as a user's machine has."""
    command = [sys.executable, "-c", "from lmjax.cli.main import main; main()", *arguments]
    place = {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(CACHE)}
    done = subprocess.run(
        command, cwd=directory, env=os.environ | place, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_walk_through_runs_and_transformers_finds_the_same_loss(tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    package = tmp_path / "downloads" / Path(smollm2.MEMBER).parent
    package.mkdir(parents=True)
    ran = []
    for block in blocks("conversion"):
        if block.language == "yaml":
            (tmp_path / block.text.partition("\n")[0].removeprefix("# ")).write_text(block.text)
        if block.note == "fetch":
            assert smollm2.PACKAGE in block.text
            (package / Path(smollm2.MEMBER).name).symlink_to(smollm2.smollm2_gguf())
            continue
        ran += [lmjax(tmp_path, *words[1:]) for words in commands(block)] if block.language == "sh" else []
    assert "The capital of France is Paris" in ran[0]
    assert len(ran) == 7

    losses = [json.loads(line) for line in (tmp_path / "runs/smollm2/metrics.jsonl").read_text().splitlines()]
    held_out = [row["eval_loss"] for row in losses if "eval_loss" in row]
    assert held_out[-1] < held_out[0], "it learned something of the standard library"

    text = ROOT / "configs" / "quickstart.yaml"
    ours = json.loads(lmjax(tmp_path, "evaluate", "runs/smollm2", "--text", str(text), "--json"))
    exported = tmp_path / "exported" / "smollm2"
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    ids = np.array([tokenizer(text.read_text()).input_ids])
    assert ids.shape[1] == ours["tokens"] + 1
    assert smollm2.oracle_nll(model, ids) == pytest.approx(ours["nll"], rel=1e-5)


@pytest.mark.fast
def test_the_page_shows_a_family_as_it_is():
    (shown,) = [block.text for block in blocks("conversion") if block.language == "python"]
    assert shown in Path(mistral.__file__).read_text()
