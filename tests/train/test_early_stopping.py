"""When a run ends early is a function of its evaluations alone."""

import pytest

from lmjax.errors import InputError
from lmjax.train.config import EarlyStoppingConfig
from lmjax.train.early_stopping import Progress, progress, reason_to_stop

pytestmark = pytest.mark.fast

LOSSES = [5.0, 4.0, 3.9, 4.1, 3.95, 3.5]


def evaluations(losses: list[float]) -> list[tuple[int, float]]:
    return [(10 * number, loss) for number, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("min_delta", "expected"),
    [
        (0.0, [(0, 5.0, 0), (10, 4.0, 0), (20, 3.9, 0), (20, 3.9, 1), (20, 3.9, 2), (50, 3.5, 0)]),
        (0.2, [(0, 5.0, 0), (10, 4.0, 0), (10, 4.0, 1), (10, 4.0, 2), (10, 4.0, 3), (50, 3.5, 0)]),
    ],
)
def test_progress_after_each_evaluation(min_delta: float, expected: list[tuple]):
    found = [progress(evaluations(LOSSES[: number + 1]), min_delta) for number in range(len(LOSSES))]
    assert found == [Progress(*one) for one in expected]


def test_an_equal_loss_is_no_improvement():
    assert progress(evaluations([2.0, 2.0]), 0.0) == Progress(0, 2.0, 1)


@pytest.mark.parametrize(("patience", "stops_after"), [(1, 4), (2, 5), (3, None)])
def test_a_run_stops_once_the_patience_is_used_up(patience: int, stops_after: int | None):
    config = EarlyStoppingConfig(patience=patience)
    found = [bool(reason_to_stop(config, evaluations(LOSSES[:number]))) for number in range(1, len(LOSSES))]
    first = next((number for number, stops in enumerate(found, 1) if stops), None)
    assert first == stops_after


def test_the_reason_names_the_best_step_and_without_a_config_there_is_none():
    told = reason_to_stop(EarlyStoppingConfig(patience=2, min_delta=0.01), evaluations(LOSSES[:5]))
    assert told is not None
    assert "by more than 0.01 in the last 2 evaluations: the best is 3.9000 of step 20" in told
    assert reason_to_stop(None, evaluations([1.0] * 50)) is None
    assert reason_to_stop(EarlyStoppingConfig(patience=1), []) is None


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"patience": 1, "min_delta": -0.1}])
def test_a_patience_below_1_and_a_negative_delta_are_refused(wrong: dict):
    with pytest.raises(InputError, match="it has to be"):
        EarlyStoppingConfig(**wrong)
