"""The held-out loss is a mean over all targets, whatever the batches, and the unigram loss is on the same ones."""

import numpy as np
import pytest

from lmjax.train.evaluate import make_evaluator, unigram_log_probs
from tests import tiny
from tests.tiny import CONFIG, FLOAT32, LOSS


@pytest.mark.fast
def test_unigram_probabilities_are_add_one_smoothed_over_the_tokens_of_the_tokenizer():
    found = np.exp(unigram_log_probs((3, 0, 1)))
    np.testing.assert_allclose(found, np.array([4, 1, 2]) / 7, rtol=1e-6)


def test_an_evaluation_is_the_mean_over_the_weighted_targets_of_all_batches(rng):
    """Batches of unequal numbers of targets, one of them empty; a tokenizer smaller than the model's vocabulary."""
    trainer = tiny.Trainer(CONFIG, tiny.mesh_of(2, 2, 2))
    blueprint = trainer.blueprint
    batches = [tiny.packed_batch(rng, tiny.with_changes(CONFIG, vocab_size=80)) for _ in range(2)]
    few = np.arange(tiny.ROWS)[:, None] < 3
    batches[1] = batches[1]._replace(weights=np.where(few, batches[1].weights, 0))
    empty = type(batches[0])(*(np.zeros_like(field) for field in batches[0]))
    counts = rng.integers(0, 50, 80)
    evaluate = make_evaluator(blueprint, FLOAT32, LOSS, tuple(counts.tolist()))
    params = tiny.state_of(blueprint, tiny.random_params(blueprint, np.random.default_rng(1))).params
    placed = [tiny.to_mesh(batch, blueprint.mesh) for batch in (*batches, empty)]
    found = evaluate(params, iter(placed))

    losses = [trainer.train([batch], 1)[1][0].loss for batch in batches]  # of the same parameters, before an update
    weights = np.array([batch.weights.sum() for batch in batches])
    assert found.tokens == weights.sum()
    assert found.eval_loss == pytest.approx(np.average(losses, weights=weights), rel=1e-6)
    assert found.eval_loss != pytest.approx(np.mean(losses), rel=1e-4)
    assert found.perplexity == pytest.approx(np.exp(found.eval_loss))
    log_probs = np.log((counts + 1) / (counts.sum() + 80))
    unigram = sum(-(batch.weights * log_probs[batch.targets]).sum() for batch in batches) / weights.sum()
    assert found.unigram_loss == pytest.approx(unigram, rel=1e-6)
