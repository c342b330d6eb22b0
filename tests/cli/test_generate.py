"""``lmjax generate`` on a run: the run's own parameters and tokenizer, and what is refused."""

import json
import shutil

import numpy as np
import pytest

from lmjax.data.tokenizer import ByteTokenizer
from lmjax.generate.decode import Generator
from tests import tiny
from tests.cli.trained_run import STEPS, TrainedRun, make_run
from tests.command import lmjax

PROMPTS = ["ab", "another"]
OPTIONS = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--max-tokens", "6", "--temperature", "0"]


@pytest.fixture(scope="module")
def run(request, tmp_path_factory) -> TrainedRun:
    seed = request.config.getoption("--seed")
    return make_run(tmp_path_factory.mktemp("generate"), np.random.default_rng(seed))


def refused(capsys, *arguments) -> str:
    """The message of a command that ends with exit code 2."""
    assert lmjax("generate", *map(str, arguments)) == 2
    return capsys.readouterr().err


def test_prompts_are_continued_by_the_newest_checkpoint_or_the_one_that_is_named(run, capsys):
    generator = Generator(run.blueprint, tiny.FLOAT32, ByteTokenizer())
    options = {"max_tokens": 6, "temperature": 0.0, "seed": 0}
    expected = {step: generator.generate_texts(run.params[step], PROMPTS, **options) for step in STEPS}
    assert expected[STEPS[0]] != expected[STEPS[1]]
    for model, step in ((run.directory, STEPS[1]), (run.directory / "checkpoints" / str(STEPS[0]), STEPS[0])):
        assert lmjax("generate", str(model), *OPTIONS, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert found["step"] == step
        assert [sample["prompt"] for sample in found["samples"]] == PROMPTS
        assert [sample["text"] for sample in found["samples"]] == expected[step]
        assert all(sample["tokens"] == 6 or sample["finished"] for sample in found["samples"])
    assert lmjax("generate", str(run.directory), *OPTIONS, "mesh.fsdp=2", "mesh.tensor=4") == 0
    one, other = (prompt + text for prompt, text in zip(PROMPTS, expected[STEPS[1]], strict=True))
    assert capsys.readouterr().out == f"--- prompt 1 ---\n{one}\n--- prompt 2 ---\n{other}\n"


@pytest.mark.fast
def test_what_is_not_a_model_is_refused(run, capsys, tmp_path):
    assert "no such directory. Give a run directory" in refused(capsys, tmp_path / "runs")
    assert "not a model. Give a run directory" in refused(capsys, run.directory / "checkpoints")
    assert "no checkpoint of step 5. Checkpoints here: 4, 6" in refused(capsys, run.directory / "checkpoints" / "5")
    (tmp_path / "run").mkdir()
    shutil.copy(run.directory / "config.yaml", tmp_path / "run")
    assert "has saved no checkpoint yet" in refused(capsys, tmp_path / "run")


@pytest.mark.fast
def test_options_that_cannot_be_are_refused(run, capsys):
    message = refused(capsys, run.directory, "train.steps=9")
    assert "override train.steps=9: has no effect here; these have: mesh, precision, data.path" in message
    assert "model.max_length is 32" in refused(capsys, run.directory, "--prompt", "abcd", "--max-tokens", "28")
    assert "mesh: data 1 x tensor 3 = 3 does not divide the 8" in refused(capsys, run.directory, "mesh.tensor=3")


@pytest.mark.fast
def test_another_dataset_than_the_runs_is_refused(run, capsys, tmp_path):
    (tmp_path / "other").mkdir()
    other = make_run(tmp_path / "other", np.random.default_rng(0), texts={"train": ["else"], "validation": ["more"]})
    message = refused(capsys, run.directory, f"data.path={other.dataset}")
    assert "trained on the dataset" in message
    assert str(other.dataset) in message
    assert "no prepared dataset here" in refused(capsys, run.directory, f"data.path={tmp_path}")
