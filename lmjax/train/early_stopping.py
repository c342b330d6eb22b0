"""When the evaluation loss has stopped falling."""

from collections.abc import Iterable
from typing import NamedTuple

from lmjax.train.config import EarlyStoppingConfig


class Progress(NamedTuple):
    """Where the evaluation loss of a run stands."""

    step: int
    """Of the last improvement."""
    loss: float
    """Of that evaluation, in nats."""
    since: int
    """Evaluations after it."""


def progress(evaluations: Iterable[tuple[int, float]], min_delta: float) -> Progress | None:
    """From the (step, loss) of all evaluations in their order; None where there is none.

    The first one is an improvement, and so is each that is more than ``min_delta`` below the last improvement.
    """
    best: Progress | None = None
    for step, loss in evaluations:
        if best is None or loss < best.loss - min_delta:
            best = Progress(step, loss, 0)
        else:
            best = best._replace(since=best.since + 1)
    return best


def reason_to_stop(config: EarlyStoppingConfig | None, evaluations: Iterable[tuple[int, float]]) -> str | None:
    """Why the run ends after these evaluations, in words; None where it goes on."""
    if config is None:
        return None
    best = progress(evaluations, config.min_delta)
    if best is None or best.since < config.patience:
        return None
    by = f" by more than {config.min_delta}" if config.min_delta else ""
    return (
        f"the evaluation loss has not fallen{by} in the last {best.since} evaluations: the best is {best.loss:.4f} of "
        f"step {best.step} (evaluate.early_stopping.patience {config.patience})"
    )
