"""A run with experts through a kill and the other commands: what a dense one does, with its routers' state and rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.command import lmjax
from tests.run.conftest import EXPERIMENT
from tests.run.test_processes import COMMAND, IN_PROCESS_1_BEFORE_BATCH_2, launch, train_rows

pytestmark = pytest.mark.slow

DEEPSEEK: dict[str, Any] = {
    "num_layers": 3,
    "head_dim": 12,
    "rope_interleaved": True,
    "latent": {"kv_rank": 16, "rope_dim": 4, "value_dim": 8},
    "moe": {
        "num_experts": 8,
        "experts_per_token": 2,
        "expert_dim": 16,
        "dense_first": 1,
        "scores": "sigmoid",
        "groups": 4,
        "top_groups": 2,
        "choice_bias_rate": 0.01,
        "shared_dim": 32,
    },
}
"""Latent attention, a dense block, and experts whose choices have a bias: state that no gradient moves."""
MESH = {"data": 2, "fsdp": 2, "expert": 2}
TEXT = "the model reads one row of tokens"


@pytest.fixture(scope="module")
def config(dataset: dict) -> dict[str, Any]:
    return {**EXPERIMENT, "model": {**EXPERIMENT["model"], **DEEPSEEK}, "mesh": MESH, "data": dataset}


def write(config: dict[str, Any], run: Path) -> str:
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**config, "run_dir": str(run)}))
    return str(file)


@pytest.fixture(scope="module")
def whole(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 6 updates, saved after 2, 4 and 6."""
    run = tmp_path_factory.mktemp("experts") / "whole"
    assert lmjax("train", write(config, run)) == 0
    return run


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def say(*arguments: str) -> Any:
        """What a command prints as JSON."""
        capsys.readouterr()
        assert lmjax(*arguments, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return say


def test_two_processes_of_which_one_was_killed_go_on_in_one(whole: Path, config: dict[str, Any], tmp_path: Path):
    run = tmp_path / "killed"
    file = write(config, run)
    code = IN_PROCESS_1_BEFORE_BATCH_2.format("os.kill(os.getpid(), signal.SIGKILL)") + COMMAND
    # The other way to bring tokens to their experts, which may change as the mesh may.
    ended = launch(2, 4, "train", file, "train.expert_exchange=ragged", code=code)
    assert ended.returncode != 0
    assert len(train_rows(run)) < 6, ended.stdout + ended.stderr
    assert lmjax("train", file) == 0
    found, expected = train_rows(run), train_rows(whole)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(found, expected, strict=True):
        assert one["batch_hash"] == other["batch_hash"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["router"].keys() == other["router"].keys() == {"1", "2"}
        for block, router in one["router"].items():
            assert router["load"] == other["router"][block]["load"]
    biases = [checkpointed_biases(path, tmp_path) for path in (run, whole)]
    assert np.array_equal(*biases)
    assert np.unique(np.abs(biases[0])).size > 1


def checkpointed_biases(run: Path, tmp_path: Path) -> np.ndarray:
    """The biases of choices of the last step, as transformers reads them from an exported run."""
    from safetensors.numpy import load_file

    out = tmp_path / f"{run.name}-exported"
    assert lmjax("convert", "export", str(run), str(out)) == 0
    tensors = load_file(out / "model.safetensors")
    return np.stack([tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] for layer in (1, 2)])


def test_what_was_trained_is_evaluated_sampled_exported_and_imported(
    whole: Path, tmp_path: Path, said: Callable[..., Any]
):
    evaluated = said("evaluate", str(whole))
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert evaluated["eval_loss"] == pytest.approx(losses[-1], rel=1e-6)
    assert losses[-1] < losses[0] - 0.5

    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    exported, imported = tmp_path / "exported", tmp_path / "imported"
    assert lmjax("convert", "export", str(whole), str(exported)) == 0
    assert lmjax("convert", "import", str(exported), str(imported)) == 0
    assert lmjax("convert", "check", str(whole), str(imported)) == 0
    samples, nlls = [], []
    for model in (whole, exported, imported):
        nlls.append(said("evaluate", str(model), "--text", str(text))["nll"])
        options = ["--prompt", TEXT, "--max-tokens", "12", "--temperature", "0"]
        samples.append(said("generate", str(model), *options)["samples"][0]["text"])
    assert samples[1] == samples[2] == samples[0] != ""
    assert nlls == pytest.approx([nlls[0]] * 3, rel=1e-6)
