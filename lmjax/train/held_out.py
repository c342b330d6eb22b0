"""What is measured between updates: the loss on held-out rows, samples, and whether the run goes on after them."""

import dataclasses
import functools
from collections.abc import Iterator

from jax.sharding import Mesh

from lmjax.checkpoint.processes import share
from lmjax.generate.decode import Generator
from lmjax.generate.options import Options
from lmjax.train.early_stopping import reason_to_stop
from lmjax.train.evaluate import make_evaluator
from lmjax.train.faults import check_finite
from lmjax.train.feed import to_devices
from lmjax.train.job import Dataset, Job, Program
from lmjax.train.metrics import Recorder
from lmjax.train.state import TrainState
from lmjax.train.step import DeviceBatch


class HeldOut:
    """Scores the validation rows and continues the prompts, between updates."""

    def __init__(self, job: Job, program: Program, dataset: Dataset, recorder: Recorder):
        """What the run has evaluated already is known to ``recorder``, and so to all processes."""
        self._job, self._program, self._dataset, self._recorder = job, program, dataset, recorder
        evaluations, self._last_evaluated = share([recorder.evaluations, recorder.last_evaluated])
        self._evaluations = [(step, loss) for step, loss in evaluations]
        counts = dataset.index.token_counts
        self._evaluate = make_evaluator(program.blueprint, program.execution, program.loss, counts)
        self._generator = (
            Generator(program.blueprint, program.execution, dataset.tokenizer) if job.evaluate.prompts else None
        )
        temperature = 0.8 if job.evaluate.temperature is None else job.evaluate.temperature
        self._options = Options(max_tokens=job.evaluate.sample_tokens or 64, temperature=temperature)
        if self._generator is not None:  # now, and not at the first evaluation after a run has gone on for hours
            prompts = [self._generator.encode(prompt) for prompt in job.evaluate.prompts]
            self._generator.check(prompts, self._options)

    def due(self, step: int) -> bool:
        """Whether there is something to measure after ``step`` updates."""
        chosen = step % self._job.evaluate.every_steps == 0 or step == self._job.train.steps
        return chosen and (self._dataset.evaluation is not None or self._generator is not None)

    def owed(self, step: int) -> bool:
        """Whether it is due and was not done: a signal stopped the run in between."""
        return self.due(step) and self._last_evaluated < step

    def score(self, step: int, state: TrainState, last_saved: int | None) -> None:
        """Raises DivergedError for a loss that is not finite, before anything of these parameters is written."""
        if self._dataset.evaluation is not None:
            result = self._evaluate(state.params, self._batches())
            check_finite(step, {"eval_loss": result.eval_loss}, last_saved)
            self._evaluations.append((step, result.eval_loss))
            self._recorder.evaluation_row({"step": step, **result._asdict()})
        if self._generator is not None:
            config = self._job.evaluate
            options = dataclasses.replace(self._options, seed=self._job.train.seed + step)
            samples = self._generator.generate_texts(state.params, config.prompts, options)
            rows = zip(config.prompts, samples, strict=True)
            self._recorder.sample_rows({"step": step, "prompt": prompt, "text": text} for prompt, text in rows)
        self._last_evaluated = step

    def reason_to_stop(self) -> str | None:
        """Why the run ends before its last step; the same on every process, and in a run that was resumed."""
        return reason_to_stop(self._job.evaluate.early_stopping, self._evaluations)

    def _batches(self) -> Iterator[DeviceBatch]:
        return evaluation_batches(self._dataset, self._job, self._program.mesh)


def evaluation_batches(dataset: Dataset, job: Job, mesh: Mesh) -> Iterator[DeviceBatch]:
    """The validation rows to score, on the devices, one micro-batch at a time."""
    source = dataset.evaluation
    assert source is not None
    for number in range(source.num_batches):
        rows = functools.partial(source.rows, number)
        yield to_devices(rows, source.global_batch_size, job.data.sequence_length, 1, mesh)
