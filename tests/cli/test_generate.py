"""``lmjax generate`` on a run: the run's own parameters and tokenizer, and what is refused."""

import io
import json
import shutil

import numpy as np
import pytest

from lmjax.data.tokenizer import ByteTokenizer
from lmjax.generate.decode import Generator
from lmjax.generate.options import Options
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
    options = Options(max_tokens=6, temperature=0.0)
    expected = {step: generator.generate_texts(run.params[step], PROMPTS, options) for step in STEPS}
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


def test_prompts_of_a_file_give_a_line_a_sample(run, capsys, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab", "id": 3}\r\n{"prompt": ""}\n{"prompt": "abc"}\n')
    options = ["--max-tokens", "6", "--num-samples", "2", "--top-k", "9", "--logprobs", "1", "--stop", "\0\0"]
    file = ["--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "out.jsonl", "--batch-size", "2"]
    assert lmjax("generate", *map(str, [run.directory, *file, *options])) == 0
    assert capsys.readouterr().out == ""
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    order = [(prompt, sample) for prompt in ("ab", "", "abc") for sample in (1, 2)]
    assert [(line["prompt"], line["sample"]) for line in lines] == order
    for line in lines:
        assert line["tokens"] == len(line["token_ids"]) == len(line["logprobs"])
        assert line["finish_reason"] in ("eos", "stop", "length")
        assert line["text"] == ByteTokenizer().decode(line["token_ids"]).partition("\0\0")[0]
        for one, token in zip(line["logprobs"], line["token_ids"], strict=True):
            assert (one["id"], one["token"]) == (token, ByteTokenizer().decode([token]))
            assert one["best"][0]["logprob"] >= one["logprob"]
    assert lines[0]["text"] != lines[1]["text"]
    assert lmjax("generate", *map(str, [run.directory, "--prompt", "ab", "--json", *options])) == 0
    # Alone, the same samples; their numbers have other last bits in a batch of another shape.
    alone = json.loads(capsys.readouterr().out)["samples"]
    assert [sample["token_ids"] for sample in alone] == [line["token_ids"] for line in lines[:2]]


def test_lines_of_the_terminal_are_continued_until_they_end(run, capsys, monkeypatch):
    too_long = "a" * 30
    monkeypatch.setattr("sys.stdin", io.StringIO(f"ab\n{too_long}\nab\n"))
    options = ["--max-tokens", "6", "--temperature", "0"]
    assert lmjax("generate", str(run.directory), "--interactive", *options) == 0
    told = capsys.readouterr()
    assert lmjax("generate", str(run.directory), "--prompt", "ab", *options) == 0
    once = capsys.readouterr().out
    assert told.out == once * 2
    assert once.startswith("ab")
    assert told.err.count("model.max_length is 32") == 1


@pytest.mark.fast
def test_what_is_not_a_model_is_refused(run, capsys, tmp_path):
    assert "no such file or directory. Give a run directory" in refused(capsys, tmp_path / "runs")
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
    for arguments, told in [
        (["--top-k", "260"], "top_k is 260, but the vocabulary has 259 tokens"),
        (["--min-p", "1.5"], "min_p is 1.5; it has to be above 0 and at most 1"),
        (["--stop", ""], "a stop string is empty"),
        (["--temperature", "0", "--top-p", "0.5"], "top_p: no effect at temperature 0"),
        (["--logprobs", "2"], "--logprobs: they are printed with --json"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--prompt", "a", "--prompts", "b"], "--prompt and --prompts: give one of them"),
        (["--interactive", "--json"], "--interactive: no effect of --json"),
        (["--output", "x", "--json"], "--output and --json: give one of them"),
    ]:
        assert told in refused(capsys, run.directory, *arguments)
    assert "mesh: data 1 x expert 1 x tensor 3 = 3 does not divide the 8" in refused(
        capsys, run.directory, "mesh.tensor=3"
    )


@pytest.mark.fast
def test_another_dataset_than_the_runs_is_refused(run, capsys, tmp_path):
    (tmp_path / "other").mkdir()
    other = make_run(tmp_path / "other", np.random.default_rng(0), texts={"train": ["else"], "validation": ["more"]})
    message = refused(capsys, run.directory, f"data.path={other.dataset}")
    assert "trained on the dataset" in message
    assert str(other.dataset) in message
    assert "no prepared dataset here" in refused(capsys, run.directory, f"data.path={tmp_path}")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, ": no such file; give a file of prompts, one a line"),
        ("a.txt", b"", ": no prompt in it; write one a line"),
        ("a.txt", b"one\n\nthree\n", ":2: an empty line; remove it, or write the prompts as JSON"),
        ("a.txt", b"caf\xe9", ": not UTF-8 text (byte 3)"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', ':2: no text under "prompt"'),
        ("a.jsonl", b"[]\n", ':1: no text under "prompt"'),
        ("a.jsonl", b"a\n", ":1: not JSON"),
    ],
)
def test_a_file_without_a_prompt_in_every_line_is_refused(capsys, tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    assert f"{file}{message}" in refused(capsys, tmp_path, "--prompts", file)
