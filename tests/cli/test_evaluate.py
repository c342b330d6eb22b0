"""``lmjax evaluate`` on a run: a file as one document, the held-out rows, and what is refused."""

import json

import numpy as np
import pytest

from lmjax.generate.score import Scorer
from tests import tiny
from tests.cli.trained_run import CONFIG, STEPS, TrainedRun, make_run
from tests.command import lmjax

TEXT = "\ufeffA text of two lines,\r\nlonger than the model's rows: é.\n"


@pytest.fixture(scope="module")
def run(request, tmp_path_factory) -> TrainedRun:
    seed = request.config.getoption("--seed")
    return make_run(tmp_path_factory.mktemp("evaluate"), np.random.default_rng(seed))


def evaluate(capsys, *arguments) -> dict:
    assert lmjax("evaluate", *map(str, arguments), "--json") == 0
    return json.loads(capsys.readouterr().out)


def score(run: TrainedRun, tokens: list[int], step: int = STEPS[-1], **options) -> float:
    return Scorer(run.blueprint, tiny.FLOAT32).score(run.params[step], tokens, **options).nll


def test_a_file_is_scored_byte_for_byte_as_one_document(run, capsys, tmp_path):
    file = tmp_path / "text"
    file.write_bytes(TEXT.encode())
    tokens = [256, *TEXT.encode()]
    assert len(tokens) > CONFIG.max_length + 1
    found = evaluate(capsys, run.directory, "--text", file)
    assert set(found) == {"nll", "tokens", "perplexity"}
    assert found["tokens"] == len(tokens) - 1
    np.testing.assert_allclose(found["nll"], score(run, tokens), rtol=1e-5)
    np.testing.assert_allclose(found["perplexity"], np.exp(found["nll"] / found["tokens"]), rtol=1e-12)
    older = evaluate(capsys, run.directory / "checkpoints" / str(STEPS[0]), "--text", file, "--stride", 3)
    np.testing.assert_allclose(older["nll"], score(run, tokens, STEPS[0], stride=3), rtol=1e-5)
    assert abs(older["nll"] - score(run, tokens, STEPS[0])) > 1e-3


def test_without_a_file_the_held_out_rows_are_scored(run, capsys):
    nlls = [score(run, document) for document in run.documents("validation")]
    tokens = [len(document) - 1 for document in run.documents("validation")]
    found = evaluate(capsys, run.directory)
    assert set(found) == {"step", "eval_loss", "perplexity", "unigram_loss", "tokens"}
    assert (found["step"], found["tokens"]) == (STEPS[-1], sum(tokens))
    np.testing.assert_allclose(found["eval_loss"], sum(nlls) / sum(tokens), rtol=1e-5)
    # Each document has a row to itself; the longest is packed first.
    first = evaluate(capsys, run.directory, "evaluate.max_rows=1")
    longest = int(np.argmax(tokens))
    assert first["tokens"] == tokens[longest]
    np.testing.assert_allclose(first["eval_loss"], nlls[longest] / tokens[longest], rtol=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"caf\xe9", "not UTF-8 text (byte 3)"),
        (b"", "1 token(s), and the first is not scored"),
    ],
)
def test_a_file_that_cannot_be_scored_is_refused(run, capsys, tmp_path, content, message):
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    assert lmjax("evaluate", str(run.directory), "--text", str(file)) == 2
    told = capsys.readouterr().err
    assert message in told
    assert str(file) in told


@pytest.mark.fast
def test_options_without_effect_are_refused(run, capsys, tmp_path):
    for arguments, message in [
        (["--stride", "2"], "--stride is about the windows over a file"),
        (["--text", str(tmp_path)], "a directory"),
        (["--text", __file__, "--stride", "33"], "stride is 33"),
        (["--text", __file__, "evaluate.max_rows=3"], "override evaluate.max_rows=3: has no effect here"),
    ]:
        assert lmjax("evaluate", str(run.directory), *arguments) == 2
        assert message in capsys.readouterr().err
