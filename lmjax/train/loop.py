"""A run from its first step to its last: everything that happens in it is in ``run``."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lmjax import __version__
from lmjax.checkpoint.processes import decide
from lmjax.checkpoint.restore import restore
from lmjax.checkpoint.save import Saver
from lmjax.compat import device_memory_peak
from lmjax.data.index import fingerprint
from lmjax.errors import InputError, PreemptedError
from lmjax.generate.decode import Generator
from lmjax.models.counts import parameter_count, training_flops
from lmjax.train.evaluate import make_evaluator
from lmjax.train.faults import StopSignal, check_finite
from lmjax.train.feed import Feed, abstract_batch, to_devices
from lmjax.train.job import Dataset, Job, Program, make_program, open_dataset
from lmjax.train.metrics import Recorder, peak_flops
from lmjax.train.state import TrainState, init_state
from lmjax.train.step import DeviceBatch, StepMetrics, make_step


def run(job: Job) -> None:
    """Train from the newest checkpoint in the run's directory, or from the beginning, to the last step.

    Every process of the run calls it. Raises PreemptedError after a signal and a durable save, DivergedError for a loss
    that is not finite, InputError for configs, datasets and checkpoints that do not go together.
    """
    with contextlib.ExitStack() as cleanup:  # each end is reached, whatever another one raises
        stop = cleanup.enter_context(StopSignal())  # a signal while this is set up stops the run after its first step
        primary = jax.process_index() == 0
        program = make_program(job)
        dataset = open_dataset(job)
        mesh, blueprint = program.mesh, program.blueprint
        checkpoints = Path(job.run_dir) / "checkpoints"
        restored = restore(checkpoints, blueprint.state)
        start, tokens, state = 0, 0.0, None
        if restored is not None:
            check_same_data(restored.metadata, dataset, checkpoints / str(restored.step))
            start, tokens, state = restored.step, restored.metadata["tokens"], restored.state
        recorder = Recorder(Path(job.run_dir), job.logging, start=start, steps=job.train.steps, primary=primary)
        cleanup.callback(recorder.close)
        saver = Saver(str(checkpoints), job.checkpoint)
        cleanup.callback(saver.close)
        for skipped in restored.skipped if restored else ():
            recorder.message(f"checkpoint {skipped.step} is not good and was skipped: {skipped.why}")
        if start >= job.train.steps:
            recorder.message(f"{job.run_dir}: all {job.train.steps} steps are done; raise train.steps to go on")
            return
        where = "from the beginning" if restored is None else f"from the checkpoint of step {start}"
        recorder.message(
            f"{parameter_count(job.model):,} parameters on {mesh.size} device(s) {dict(mesh.shape)}; training {where} "
            f"to step {job.train.steps}"
        )
        for kind, kernel in program.kernels.items():
            recorder.message(f"attention of {kind} blocks: {kernel.name} ({kernel.why})")
        state = init_state(blueprint, job.train.seed) if state is None else state
        held_out = HeldOut(job, program, dataset, recorder)
        if dataset.evaluation is None:
            recorder.message(
                f"{dataset.directory} holds no document out, so no loss is evaluated: evaluate.max_rows has no effect "
                "(data.validation_fraction)"
            )
        step = compile_step(job, program, recorder)
        feed = Feed(batch_maker(job, dataset, mesh), start, job.train.steps)
        cleanup.callback(feed.close)
        clock = Clock(job, mesh)
        pending: Pending | None = None
        last_saved = None if restored is None else start

        def settle(pending: Pending | None, tokens: float) -> float:
            """Fetch and write the metrics of an update that was dispatched before; the tokens up to it."""
            if pending is None:
                return tokens
            row = clock.row(pending, tokens, feed.seconds_waited)
            check_finite(row["step"], {name: row[name] for name in ("loss", "grad_norm")}, last_saved)
            if row["step"] % job.logging.every_steps == 0 or row["step"] == job.train.steps:
                recorder.train_row(row, last=row["step"] == job.train.steps)
            return row["tokens"]

        if start == 0:
            held_out.score(0, state, last_saved)
        clock.restart()
        for number, batch in enumerate(feed, start + 1):
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, batch)
            tokens = settle(pending, tokens)  # of the update before, while the devices work on this one
            digest = dataset.batches.hash(number - 1) if job.train.log_batch_hash and primary else None
            pending = Pending(number, metrics, digest)
            last = number == job.train.steps
            evaluate = last or number % job.evaluate.every_steps == 0
            stopped = decide(stop.received is not None)
            if evaluate or stopped or number % job.checkpoint.every_steps == 0:
                tokens = settle(pending, tokens)
                pending = None
                if evaluate:
                    held_out.score(number, state, last_saved)
                if last or stopped or number % job.checkpoint.every_steps == 0:
                    saver.save(number, state, checkpoint_metadata(job, dataset, tokens))
                    last_saved = number
                clock.restart()
            if stopped and not last:
                saver.wait()
                raise PreemptedError(
                    f"stopped by a signal after step {number}, which is saved; the same command goes on from there"
                )
        saver.wait()
        waited = feed.seconds_waited / max(clock.total_seconds, 1e-9)
        recorder.message(
            f"done: step {job.train.steps}, {tokens:,.0f} tokens; {waited:.2%} of the time spent waiting for data"
        )


@dataclasses.dataclass(frozen=True)
class Pending:
    """An update that was dispatched and whose metrics were not fetched yet."""

    step: int
    metrics: StepMetrics
    batch_hash: str | None


class Clock:
    """Turns fetched metrics into rows of metrics.jsonl, with the times and rates that belong to them."""

    def __init__(self, job: Job, mesh: Mesh):
        self.total_seconds = 0.0
        """Of all updates so far, without evaluations and saves."""
        self._devices = list(mesh.local_devices)
        peak = peak_flops(self._devices[0].device_kind)
        self._peak = None if peak is None else peak * mesh.size
        self._flops = training_flops(job.model, job.train.global_batch_size, job.data.sequence_length)
        self._log_hash = job.train.log_batch_hash
        self._waited = 0.0
        self._last = time.perf_counter()

    def restart(self) -> None:
        """What happened since the last update is not part of the next."""
        self._last = time.perf_counter()

    def row(self, pending: Pending, tokens: float, seconds_waited: float) -> dict[str, Any]:
        metrics = StepMetrics(*(float(value) for value in jax.device_get(pending.metrics)))
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self.total_seconds += seconds
        waited, self._waited = seconds_waited - self._waited, seconds_waited
        memory = [peak for peak in map(device_memory_peak, self._devices) if peak is not None]
        row = {
            "step": pending.step,
            "loss": metrics.loss,
            "grad_norm": metrics.grad_norm,
            "learning_rate": metrics.learning_rate,
            "tokens": tokens + metrics.tokens,
            "tokens_per_second": metrics.tokens / seconds,
            "step_seconds": seconds,
            "data_seconds": waited,
            "mfu": None if self._peak is None else self._flops / seconds / self._peak,
            "memory_bytes": max(memory, default=None),
        }
        return row | ({"batch_hash": pending.batch_hash} if self._log_hash else {})


class HeldOut:
    """Scores the validation rows and continues the prompts, between updates."""

    def __init__(self, job: Job, program: Program, dataset: Dataset, recorder: Recorder):
        self._job, self._program, self._dataset, self._recorder = job, program, dataset, recorder
        counts = dataset.index.token_counts
        self._evaluate = make_evaluator(program.blueprint, program.execution, program.loss, counts)
        self._generator = (
            Generator(program.blueprint, program.execution, dataset.tokenizer) if job.evaluate.prompts else None
        )
        self._num_tokens = job.evaluate.sample_tokens or 64
        self._temperature = 0.8 if job.evaluate.temperature is None else job.evaluate.temperature
        if self._generator is not None:  # now, and not at the first evaluation after a run has gone on for hours
            prompts = [self._generator.encode(prompt) for prompt in job.evaluate.prompts]
            self._generator.check(prompts, self._num_tokens, self._temperature)

    def score(self, step: int, state: TrainState, last_saved: int | None) -> None:
        """Raises DivergedError for a loss that is not finite, before anything of these parameters is written."""
        if self._dataset.evaluation is not None:
            result = self._evaluate(state.params, self._batches())
            check_finite(step, {"eval_loss": result.eval_loss}, last_saved)
            self._recorder.evaluation_row({"step": step, **result._asdict()})
        if self._generator is not None:
            config = self._job.evaluate
            samples = self._generator.generate_texts(
                state.params,
                config.prompts,
                max_tokens=self._num_tokens,
                temperature=self._temperature,
                seed=self._job.train.seed + step,
            )
            rows = zip(config.prompts, samples, strict=True)
            self._recorder.sample_rows({"step": step, "prompt": prompt, "text": text} for prompt, text in rows)

    def _batches(self) -> Iterator[DeviceBatch]:
        return evaluation_batches(self._dataset, self._job, self._program.mesh)


def evaluation_batches(dataset: Dataset, job: Job, mesh: Mesh) -> Iterator[DeviceBatch]:
    """The validation rows to score, on the devices, one micro-batch at a time."""
    source = dataset.evaluation
    assert source is not None
    for number in range(source.num_batches):
        rows = functools.partial(source.rows, number)
        yield to_devices(rows, source.global_batch_size, job.data.sequence_length, 1, mesh)


def batch_maker(job: Job, dataset: Dataset, mesh: Mesh) -> Callable[[int], DeviceBatch]:
    """Global batch by number (finished updates before it), on the devices."""
    config = job.train

    def make(step: int) -> DeviceBatch:
        def rows(start: int, stop: int):
            return dataset.batches.rows(step, start, stop)

        return to_devices(rows, config.global_batch_size, job.data.sequence_length, config.accumulation, mesh)

    return make


def compile_step(job: Job, program: Program, recorder: Recorder) -> Any:
    """The compiled step; what it took is told."""
    began = time.perf_counter()
    step = jax.jit(make_step(program.blueprint, program.execution, program.loss), donate_argnums=0)
    config = job.train
    batch = abstract_batch(config.global_batch_size, job.data.sequence_length, config.accumulation, program.mesh)
    with jax.set_mesh(program.mesh):
        compiled = step.lower(program.blueprint.state, batch).compile()
    recorder.message(f"the step compiled in {time.perf_counter() - began:.1f} s")
    return compiled


def check_same_data(metadata: dict[str, Any], dataset: Dataset, checkpoint: Path) -> None:
    """Raises InputError where a checkpoint was trained on another dataset."""
    found = fingerprint(dataset.index)
    if metadata["dataset"] != found:
        raise InputError(
            f"{checkpoint}: trained on the dataset {metadata['dataset'][:16]}…, but {dataset.directory} is "
            f"{found[:16]}…. Prepare the same data again, or train in another run_dir."
        )


def checkpoint_metadata(job: Job, dataset: Dataset, tokens: float) -> dict[str, Any]:
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
    return {
        "dataset": fingerprint(dataset.index),
        "tokens": tokens,
        "config": job.resolved,
        "versions": {"lmjax": __version__} | {name: importlib.metadata.version(name) for name in packages},
    }
