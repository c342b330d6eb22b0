"""Training with every switch of the decoder: the same on eight devices as on one."""

import numpy as np
import pytest

from tests import tiny
from tests.models.switches import CONFIGS


def gradient(trainer: tiny.Trainer, batch, seed: int):
    """Every leaf in proportion to its clipped gradient: Adam's first moments after one update."""
    state = trainer.train([batch], seed)[0]
    return next(part.mu for part in state.opt_state if hasattr(part, "mu"))


@pytest.mark.parametrize(
    "name", ["rope", *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name != "rope")]
)
def test_eight_devices_train_as_one(name, rng, seed):
    """Losses of two updates and all gradients of the first: those of the second are apart by what Adam makes of
    rounding, as they are on one device where parameters differ in their last bit."""
    config = CONFIGS[name]
    batches = [tiny.packed_batch(rng, config) for _ in range(2)]
    one, eight = (tiny.Trainer(config, tiny.mesh_of(*sizes)) for sizes in ((1, 1, 1), (2, 2, 2)))
    found, expected = (trainer.train(batches, seed)[1] for trainer in (eight, one))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-5)
        assert ours.tokens == theirs.tokens
    np.testing.assert_allclose(found[0].grad_norm, expected[0].grad_norm, rtol=1e-4)
    gradients = gradient(eight, batches[0], seed)
    tiny.assert_trees_close(gradients, gradient(one, batches[0], seed), 2e-4)
    with pytest.raises(AssertionError):
        tiny.assert_trees_close(gradients, gradient(one, batches[1], seed), 2e-4)
    swapped = one.train(batches[::-1], seed)[1]
    assert abs(swapped[1].loss / expected[1].loss - 1) > 1e-4
