"""Scores of documents: every token but the first once, with the context that the windows leave."""

from typing import Any, NamedTuple

import numpy as np
import pytest

from lmjax.errors import InputError
from lmjax.generate import score
from lmjax.generate.score import Scorer, document_tokens, windows
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


class Case(NamedTuple):
    """A model on one device."""

    scorer: Scorer
    arrays: Any
    params: Any
    uncached: Uncached

    def score(self, tokens, **options):
        return self.scorer.score(self.params, list(map(int, tokens)), **options)

    def by_context(self, tokens, contexts):
        """The summed -log p of tokens[1:], target i after its contexts[i] predecessors, each in a row of its own."""
        rows = np.zeros((40, LIMIT), np.int64)
        for target, context in enumerate(contexts):
            rows[target, :context] = tokens[target + 1 - context : target + 1]
        logits = self.uncached.logits(rows)[np.arange(len(contexts)), np.array(contexts) - 1]
        return -log_softmax(logits)[np.arange(len(contexts)), tokens[1:]].sum()


@pytest.fixture(scope="module")
def case(request):
    blueprint = tiny.blueprint_of(CONFIG, tiny.mesh_of(1, 1, 1))
    arrays, params = parameters(blueprint, np.random.default_rng(request.config.getoption("--seed")))
    return Case(Scorer(blueprint, tiny.FLOAT32), arrays, params, Uncached(blueprint, params))


@pytest.mark.parametrize("length", [2, 11, LIMIT + 1])
def test_a_document_that_fits_is_scored_in_one_window(case, rng, length):
    tokens = rng.integers(0, CONFIG.vocab_size, length)
    found, expected = case.score(tokens), case.by_context(tokens, range(1, length))
    assert found.tokens == length - 1
    np.testing.assert_allclose(found.nll, expected, rtol=1e-5)
    np.testing.assert_allclose(found.perplexity, np.exp(expected / (length - 1)), rtol=1e-4)


def test_a_longer_document_is_scored_with_the_context_that_the_stride_leaves(case, rng):
    tokens = rng.integers(0, CONFIG.vocab_size, 41)
    longest = case.by_context(tokens, [min(target, LIMIT) for target in range(1, 41)])
    # Windows of 16 inputs end at the targets 16, 24, 32 and 40.
    halved = case.by_context(tokens, [*range(1, 17), *([*range(9, 17)] * 3)])
    assert abs(longest - halved) > 1e-3 * longest
    np.testing.assert_allclose(case.score(tokens, stride=1).nll, longest, rtol=1e-5)
    np.testing.assert_allclose(case.score(tokens).nll, halved, rtol=1e-5)
    assert case.score(tokens).tokens == 40


def test_score_does_not_depend_on_mesh_nor_batches(case, rng, monkeypatch):
    tokens = rng.integers(0, CONFIG.vocab_size, 41).tolist()
    expected = case.score(tokens, stride=5).nll
    monkeypatch.setattr(score, "POSITIONS_AT_ONCE", LIMIT)
    blueprint = tiny.blueprint_of(CONFIG, tiny.mesh_of(2, 2, 2))
    params = tiny.state_of(blueprint, case.arrays).params
    sharded = Scorer(blueprint, tiny.FLOAT32)
    np.testing.assert_allclose(sharded.score(params, tokens, stride=5).nll, expected, rtol=1e-6)
    tokens[20] = (tokens[20] + 1) % CONFIG.vocab_size
    assert abs(sharded.score(params, tokens, stride=5).nll - expected) > 1e-3


def test_score_equals_the_loss_of_transformers(case, rng):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.models.llama_of_transformers import as_transformers, theirs

    tokens = rng.integers(0, CONFIG.vocab_size, LIMIT)
    logits = torch.from_numpy(theirs(CONFIG, as_transformers(CONFIG, case.arrays), tokens[None]))[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(tokens[1:]), reduction="sum")
    np.testing.assert_allclose(case.score(tokens).nll, float(expected), rtol=1e-5)


@pytest.mark.fast
def test_a_document_begins_with_bos_and_has_no_end():
    assert document_tokens(Letters(), "ab") == [1, 3, 4]
    plain = Letters()
    plain.bos_id = None
    assert document_tokens(plain, "ab") == [3, 4]


def test_what_cannot_be_scored_is_refused(case):
    with pytest.raises(InputError, match="the document has 1 token"):
        case.score([1])
    for stride in (0, LIMIT + 1):
        with pytest.raises(InputError, match=f"stride is {stride}"):
            case.score([1, 2], stride=stride)
