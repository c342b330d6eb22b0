"""Scores of documents: every token but the first once, with the context that the windows leave."""

import numpy as np
import pytest

from lmjax.errors import InputError
from lmjax.generate import score
from lmjax.generate.score import document_tokens, score_tokens, windows
from tests import tiny
from tests.generate.case import Letters, Uncached, log_softmax, parameters

CONFIG = tiny.with_changes(tiny.CONFIG, num_kv_heads=2)
LIMIT = CONFIG.max_length


@pytest.mark.fast
@pytest.mark.parametrize("stride", [1, 3, 8, 16])
@pytest.mark.parametrize("num_targets", [1, 15, 16, 17, 40, 48])
def test_windows_score_every_target_once_with_enough_context(num_targets, stride):
    found = windows(num_targets, LIMIT, stride)
    scored = [target for window in found for target in range(window.first, window.stop)]
    assert scored == list(range(num_targets))
    assert (len(found) == 1) == (num_targets <= LIMIT)
    for start, first, stop in found:
        assert 0 <= start <= first < stop <= start + LIMIT
        for target in range(first, stop):
            assert target + 1 - start >= min(target + 1, LIMIT - stride + 1)


@pytest.fixture(scope="module")
def model(request):
    """A blueprint on one device, its parameters, and a way to its logits without windows."""
    blueprint = tiny.blueprint_of(CONFIG, tiny.mesh_of(1, 1, 1))
    _, params = parameters(blueprint, np.random.default_rng(request.config.getoption("--seed")))
    return blueprint, params, Uncached(blueprint, params)


def by_context(model, tokens, contexts):
    """The summed -log p of tokens[1:], target i read after its ``contexts[i]`` predecessors, one forward pass each."""
    rows = np.zeros((len(tokens) - 1, LIMIT), np.int64)
    for target, context in enumerate(contexts):
        rows[target, :context] = tokens[target + 1 - context : target + 1]
    logits = np.take_along_axis(model[2].logits(rows), np.asarray(contexts)[:, None, None] - 1, 1)[:, 0]
    return -log_softmax(logits)[np.arange(len(tokens) - 1), tokens[1:]].sum()


@pytest.mark.parametrize("length", [2, 11, LIMIT + 1])
def test_a_document_that_fits_is_scored_in_one_window(model, rng, length):
    tokens = rng.integers(0, CONFIG.vocab_size, length)
    found = score_tokens(*model[:1], tiny.FLOAT32, model[1], tokens.tolist())
    expected = by_context(model, tokens, range(1, length))
    assert found.tokens == length - 1
    np.testing.assert_allclose(found.nll, expected, rtol=1e-5)
    np.testing.assert_allclose(found.perplexity, np.exp(expected / (length - 1)), rtol=1e-4)


def test_a_longer_document_is_scored_with_the_context_that_the_stride_leaves(model, rng):
    tokens = rng.integers(0, CONFIG.vocab_size, 41)
    blueprint, params, _ = model
    longest = [min(target, LIMIT) for target in range(1, 41)]
    found = score_tokens(blueprint, tiny.FLOAT32, params, tokens.tolist(), stride=1)
    np.testing.assert_allclose(found.nll, by_context(model, tokens, longest), rtol=1e-5)
    # Full windows end at the targets 16, 24, 32 and 40.
    halved = [*range(1, 17), *([*range(9, 17)] * 3)]
    half = score_tokens(blueprint, tiny.FLOAT32, params, tokens.tolist())
    np.testing.assert_allclose(half.nll, by_context(model, tokens, halved), rtol=1e-5)
    assert found.tokens == half.tokens == 40
    assert abs(found.nll - half.nll) > 1e-3 * half.nll


def test_score_does_not_depend_on_mesh_nor_batches(model, rng, monkeypatch):
    tokens = rng.integers(0, CONFIG.vocab_size, 41).tolist()
    expected = score_tokens(model[0], tiny.FLOAT32, model[1], tokens, stride=5).nll
    monkeypatch.setattr(score, "POSITIONS_AT_ONCE", LIMIT)
    blueprint = tiny.blueprint_of(CONFIG, tiny.mesh_of(2, 2, 2))
    params = tiny.state_of(blueprint, model[1]).params
    np.testing.assert_allclose(score_tokens(blueprint, tiny.FLOAT32, params, tokens, stride=5).nll, expected, rtol=1e-6)
    tokens[20] = (tokens[20] + 1) % CONFIG.vocab_size
    assert abs(score_tokens(blueprint, tiny.FLOAT32, params, tokens, stride=5).nll - expected) > 1e-3


def test_score_equals_the_loss_of_transformers(rng):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.models.test_parity import as_transformers, theirs

    blueprint = tiny.blueprint_of(CONFIG, tiny.mesh_of(1, 1, 1))
    arrays, params = parameters(blueprint, rng)
    tokens = rng.integers(0, CONFIG.vocab_size, LIMIT)
    logits = torch.from_numpy(theirs(CONFIG, as_transformers(CONFIG, arrays), tokens[None]))[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(tokens[1:]), reduction="sum")
    found = score_tokens(blueprint, tiny.FLOAT32, params, tokens.tolist())
    np.testing.assert_allclose(found.nll, float(expected), rtol=1e-5)


@pytest.mark.fast
def test_a_document_begins_with_bos_and_has_no_end():
    assert document_tokens(Letters(), "ab") == [1, 3, 4]
    plain = Letters()
    plain.bos_id = None
    assert document_tokens(plain, "ab") == [3, 4]


@pytest.mark.fast
def test_what_cannot_be_scored_is_refused():
    blueprint = tiny.blueprint_of(CONFIG, tiny.mesh_of(1, 1, 1))
    with pytest.raises(InputError, match="the document has 1 token"):
        score_tokens(blueprint, tiny.FLOAT32, None, [1])
    for stride in (0, LIMIT + 1):
        with pytest.raises(InputError, match=f"stride is {stride}"):
            score_tokens(blueprint, tiny.FLOAT32, None, [1, 2], stride=stride)
