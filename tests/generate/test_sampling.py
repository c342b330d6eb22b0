"""Sampling: the softmax's frequencies, the most probable token at temperature 0, and keys that belong to a prompt."""

import jax
import numpy as np
import pytest

from lmjax.generate.model import place, place_rows
from lmjax.generate.options import Options
from lmjax.generate.sampling import Sampling, row_keys, sample, truncated
from lmjax.sharding import replicated
from tests import tiny
from tests.generate.case import log_softmax

DRAWS = 4096
LOGITS = np.array([0.3, -np.inf, 1.7, 1.0, -0.4, 0.0], np.float32)


def draw(logits: np.ndarray, temperature: float, step: int = 0, seed: int = 0) -> np.ndarray:
    """A token for each row of logits, from as many copies of one prompt."""
    mesh = tiny.mesh_of(2, 2, 2)
    keys = row_keys(seed, [[5, 6]] * len(logits))
    with jax.set_mesh(mesh):
        tokens = jax.jit(sample)(
            place_rows(logits, mesh),
            place_rows(keys, mesh),
            place(np.asarray(step, np.int32), replicated(mesh)),
            place(np.asarray(temperature, np.float32), replicated(mesh)),
        )
    return np.asarray(tokens)


@pytest.mark.fast
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_those_of_the_softmax(temperature):
    found = np.bincount(draw(np.tile(LOGITS, (DRAWS, 1)), temperature), minlength=len(LOGITS)) / DRAWS
    expected = np.exp(log_softmax(LOGITS / temperature))
    bound = 4 * np.sqrt(expected * (1 - expected) / DRAWS)  # standard errors; 0 for the token that cannot be
    assert np.all(np.abs(found - expected) <= bound), (found, expected)
    other = np.exp(log_softmax(LOGITS / (1.5 - temperature)))
    assert np.any(np.abs(found - other) > bound)


@pytest.mark.fast
def test_temperature_0_takes_the_first_of_the_most_probable(rng):
    logits = rng.normal(size=(8, 7)).astype(np.float32)
    logits[:, 5] = logits[:, 2] = 9
    np.testing.assert_array_equal(draw(logits, 0.0), np.full(8, 2))


@pytest.mark.fast
def test_draws_of_a_row_differ_from_step_to_step_and_from_seed_to_seed():
    logits = np.zeros((64, 50), np.float32)
    drawn = [draw(logits, 1.0), draw(logits, 1.0, step=1), draw(logits, 1.0, seed=1)]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert np.mean(one == other) < 0.2  # 1 in 50 by chance
    np.testing.assert_array_equal(drawn[0], draw(logits, 1.0))


@pytest.mark.fast
def test_the_key_of_a_prompt_does_not_depend_on_what_is_beside_it():
    alone = row_keys(3, [[1, 2]])[0]
    keys = row_keys(3, [[7], [1, 2], [1, 2], [1, 2, 3]])
    np.testing.assert_array_equal(keys[1], alone)
    distinct = [*keys.tolist(), row_keys(4, [[1, 2]])[0].tolist()]
    assert len({tuple(key) for key in distinct}) == len(distinct)


class Truncated:
    """``truncated`` on a mesh, compiled once for all options."""

    def __init__(self):
        self._mesh = tiny.mesh_of(2, 2, 2)
        self._run = jax.jit(truncated)

    def __call__(self, logits: np.ndarray, **options) -> np.ndarray:
        numbers = Sampling.of(Options(**options), logits.shape[1])
        with jax.set_mesh(self._mesh):
            sampling = jax.tree.map(lambda number: place(number, replicated(self._mesh)), numbers)
            return np.asarray(self._run(place_rows(logits, self._mesh), sampling))


@pytest.fixture(scope="module")
def cut() -> Truncated:
    return Truncated()


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 7, "temperature": 0.3},
        {"top_p": 0.9},
        {"top_p": 0.01},
        {"top_p": 0.6, "temperature": 2.5},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 12, "top_p": 0.7, "temperature": 1.7},
        {"top_k": 20, "top_p": 0.95, "min_p": 0.1, "temperature": 1.3},
    ],
)
def test_the_tokens_that_stay_are_those_of_transformers(cut, rng, options):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers").generation.logits_process
    temperature = options.get("temperature", 1.0)
    logits = (3 * rng.normal(size=(64, 50))).astype(np.float32)
    warpers = [process.TemperatureLogitsWarper(temperature)]
    warpers += [process.TopKLogitsWarper(options["top_k"])] if "top_k" in options else []
    warpers += [process.TopPLogitsWarper(options["top_p"])] if "top_p" in options else []
    warpers += [process.MinPLogitsWarper(options["min_p"])] if "min_p" in options else []
    theirs = torch.from_numpy(logits)
    for warper in warpers:
        theirs = warper(None, theirs)
    expected = torch.isfinite(theirs).numpy()
    found = cut(logits, **{"temperature": 1.0} | options)
    np.testing.assert_array_equal(np.isfinite(found), expected)
    np.testing.assert_array_equal(found[expected], logits[expected])
    assert expected.sum() < expected.size


@pytest.mark.fast
def test_options_that_are_off_leave_every_token(cut, rng):
    logits = (30 * rng.normal(size=(8, 50))).astype(np.float32)
    logits[:, 3] = -np.inf
    np.testing.assert_array_equal(cut(logits, temperature=0.1, top_k=50, top_p=1.0), logits)


@pytest.mark.fast
def test_tokens_as_probable_as_the_last_that_stays_stay_too(cut):
    logits = np.tile(np.array([2.0, 1.0, 1.0, 0.0, -1.0], np.float32), (8, 1))
    for options in ({"top_k": 2}, {"top_p": 0.7}, {"min_p": 0.36}):
        kept = np.isfinite(cut(logits, temperature=1.0, **options))
        np.testing.assert_array_equal(kept, np.tile([True, True, True, False, False], (8, 1)))
