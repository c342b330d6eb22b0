"""A run from its first step to its last: everything that happens in it is in ``run``."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from lmjax.checkpoint.processes import decide, refused_by_all
from lmjax.checkpoint.restore import restore
from lmjax.checkpoint.save import Saver
from lmjax.data.index import fingerprint
from lmjax.errors import InputError, PreemptedError
from lmjax.models.counts import parameter_count
from lmjax.paths import as_path, is_remote, working_directory
from lmjax.train.clock import Clock, Pending
from lmjax.train.executable import load_executable
from lmjax.train.faults import StopSignal, check_finite
from lmjax.train.feed import Feed, to_devices
from lmjax.train.held_out import HeldOut
from lmjax.train.initial import check_initial, initial_params
from lmjax.train.job import Dataset, Job, Program, check_fingerprint, lower_program, make_program, open_dataset
from lmjax.train.metrics import Recorder, last_step
from lmjax.train.profile import Profiler
from lmjax.train.provenance import versions
from lmjax.train.state import init_state, state_from
from lmjax.train.step import DeviceBatch
from lmjax.train.tracking import check_trackers, remove_event_files
from lmjax.xla_flags import compile_with_flags


def run(job: Job, push: Callable[[], None] | None = None, step: Any = None) -> None:
    """Train from the newest checkpoint in the run's directory, or from the beginning, to the last step.

    Every process of the run calls it. Raises PreemptedError after a signal and a durable save, DivergedError for a loss
    that is not finite, InputError for configs, datasets and checkpoints that do not go together.

    Process 0 of a run in an object store calls ``push``, which copies the run's files there (``lmjax.paths.Mirror``),
    after an evaluation and before a checkpoint is begun: no checkpoint is ahead of the rows before it. ``step`` is what
    ``load_step`` gave; without it the step is compiled.
    """
    with contextlib.ExitStack() as cleanup:  # each end is reached, whatever another one raises
        stop = cleanup.enter_context(StopSignal())  # a signal while this is set up stops the run after its first step
        primary = jax.process_index() == 0
        run_dir, steps = working_directory(job.run_dir), job.train.steps
        program = make_program(job)
        dataset = open_dataset(job)
        mesh, blueprint = program.mesh, program.blueprint
        checkpoints = as_path(job.run_dir) / "checkpoints"
        restored = restore(checkpoints, blueprint.state)
        start, tokens, state = 0, 0.0, None
        if restored is not None:
            check_same_data(restored.metadata, dataset, checkpoints / str(restored.step))
            start, tokens, state = restored.step, restored.metadata["tokens"], restored.state
        with refused_by_all("choose a run_dir that can be written to"):
            if primary:
                check_beginning(job, start)
                if restored is None and job.train.init_from is not None:
                    check_initial(job.train.init_from, job.model)
                check_trackers(job.logging)
            recorder = cleanup.enter_context(Recorder(run_dir, job.logging, start=start, steps=steps, primary=primary))
        if recorder.dropped > start:
            recorder.message(f"the rows of metrics.jsonl from step {start + 1} to {recorder.dropped} are written anew")
        saver = Saver(str(checkpoints), job.checkpoint)
        cleanup.callback(saver.close)
        for skipped in restored.skipped if restored else ():
            recorder.message(f"checkpoint {skipped.step} is not good and was skipped: {skipped.why}")
        held_out = HeldOut(job, program, dataset, recorder)
        if not held_out.owed(start) and (done := why_done(job, held_out, start)):
            recorder.message(done)
            return
        where = f"from the checkpoint of step {start}"
        if restored is None:
            where = f"from {job.train.init_from}" if job.train.init_from else "from the beginning"
        recorder.message(
            f"{parameter_count(job.model):,} parameters on {mesh.size} device(s) {dict(mesh.shape)}; training {where} "
            f"to step {steps}"
        )
        for kind, kernel in program.kernels.items():
            recorder.message(f"attention of {kind} blocks: {kernel.name} ({kernel.why})")
        if dataset.evaluation is None:
            recorder.message(
                f"{dataset.directory} holds no document out, so no loss is evaluated: evaluate.max_rows has no effect "
                "(data.validation_fraction)"
            )
        with refused_by_all("choose a run_dir that can be written to"):
            if primary:
                remove_event_files(as_path(job.run_dir) / "tensorboard")
            recorder.begin(fingerprint(dataset.index), job.resolved)
        last_saved = None if restored is None else start
        if state is not None and held_out.owed(start):
            held_out.score(start, state, last_saved)
            if done := why_done(job, held_out, start):
                recorder.message(done)
                return
        if state is None and job.train.init_from is not None:
            state = state_from(blueprint, initial_params(job.train.init_from, blueprint))
        state = init_state(blueprint, job.train.seed) if state is None else state
        if step is None:
            step = compile_step(job, program, recorder)
        else:
            recorder.message("the step was loaded, and is not compiled")
        feed = Feed(batch_maker(job, dataset, mesh), start, steps)
        cleanup.callback(feed.close)
        profiler = Profiler(run_dir / "profile", job.logging.profile_steps if primary else None)
        cleanup.callback(profiler.close)
        clock = Clock(job, mesh)
        pending: Pending | None = None
        stopped_early = None

        def settle(pending: Pending | None, tokens: float) -> float:
            """Fetch and write the metrics of an update that was dispatched before; the tokens up to it."""
            if pending is None:
                return tokens
            row = clock.row(pending, tokens, feed.seconds_waited)
            check_finite(
                row["step"], {name: row[name] for name in ("loss", "grad_norm")}, last_saved, row.get("router")
            )
            if pending.written:
                recorder.train_row(row, last=row["step"] == steps)
            if profiler.after(row["step"]):
                recorder.message(f"profiler trace up to step {row['step']}: {run_dir / 'profile'}")
                clock.restart()
            return row["tokens"]

        if start == 0:
            held_out.score(0, state, last_saved)
        clock.restart()
        for number, batch in enumerate(feed, start + 1):
            profiler.before(number)
            with jax.transfer_guard("disallow"), jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, metrics = step(state, batch)
            tokens = settle(pending, tokens)  # of the update before, while the devices work on this one
            last = number == steps
            written = primary and (last or number % job.logging.every_steps == 0)
            pending = Pending(number, metrics, written, told_of_batch(job, dataset, number - 1) if written else {})
            evaluate = held_out.due(number)
            stopped = decide(stop.received is not None)
            save = last or stopped or number % job.checkpoint.every_steps == 0
            if evaluate or save:
                tokens = settle(pending, tokens)
                pending = None
                if evaluate and not stopped:  # a process that is told to stop may be killed soon: it saves first
                    held_out.score(number, state, last_saved)
                    stopped_early = held_out.reason_to_stop()
                if is_remote(job.run_dir):
                    with refused_by_all("make room, or set LMJAX_CACHE to a directory that can be written to"):
                        if push is not None:
                            push()
                if save or stopped_early:
                    saver.save(number, state, checkpoint_metadata(job, dataset, tokens))
                    last_saved = number
                clock.restart()
            if stopped and (evaluate or not last):
                saver.wait()
                raise PreemptedError(
                    f"stopped by a signal after step {number}, which is saved; the same command goes on from there"
                )
            if stopped_early:
                break
        saver.wait()
        waited = feed.seconds_waited / max(clock.total_seconds, 1e-9)
        if stopped_early:
            recorder.message(f"stopped early after step {last_saved}, which is saved: {stopped_early}")
        recorder.message(f"done: step {last_saved}, {tokens:,.0f} tokens; waited for data {waited:.2%} of the time")


def why_done(job: Job, held_out: HeldOut, step: int) -> str | None:
    """Why there is nothing left to train after ``step`` updates; None where there is."""
    if step >= job.train.steps:
        return f"{job.run_dir}: all {job.train.steps} steps are done; raise train.steps to go on"
    if reason := held_out.reason_to_stop():
        return f"{job.run_dir}: stopped early after step {step}: {reason}. Raise the patience to go on"
    return None


def check_beginning(job: Job, start: int) -> None:
    """Raises InputError where a run that has to begin at step 0 had saved checkpoints, which are gone."""
    rows = last_step(working_directory(job.run_dir) / "metrics.jsonl")
    if start or rows < 1:
        return
    # A directory on a disk is made before the first step. The checkpoint before the last is durable when that is begun.
    is_gone = not is_remote(job.run_dir) and not Path(job.run_dir, "checkpoints").exists()
    if is_gone or rows > 2 * job.checkpoint.every_steps:
        raise InputError(
            f"{job.run_dir}: metrics.jsonl goes to step {rows}, but there is no checkpoint: training would begin again "
            "at step 0 and write these rows anew. Bring run_dir/checkpoints back, or move metrics.jsonl away."
        )


def told_of_batch(job: Job, dataset: Dataset, number: int) -> dict[str, Any]:
    """What a row says of global batch ``number`` (updates before it)."""
    mixture = dataset.batches.mixture(number)
    told: dict[str, Any] = {"mixture": mixture} if mixture else {}
    return told | ({"batch_hash": dataset.batches.hash(number)} if job.train.log_batch_hash else {})


def batch_maker(job: Job, dataset: Dataset, mesh: Mesh) -> Callable[[int], DeviceBatch]:
    """Global batch by number (finished updates before it), on the devices."""
    config = job.train

    def make(step: int) -> DeviceBatch:
        def rows(start: int, stop: int):
            return dataset.batches.rows(step, start, stop)

        return to_devices(rows, config.global_batch_size, job.data.sequence_length, config.accumulation, mesh)

    return make


def load_step(job: Job, executable: str) -> Any:
    """The compiled step of a file (``lmjax.train.executable``), for ``run``; every process calls it.

    Raises InputError on all of them where one cannot read the file, or it is of anything else.
    """
    with refused_by_all("name a file that every process can read"):
        program = make_program(job)
        return load_executable(executable, lower_program(job, program), program.mesh, job.train.xla_flags)


def compile_step(job: Job, program: Program, recorder: Recorder) -> Any:
    """The compiled step; what it took is told, and with which flags of the compiler."""
    began, asked = time.perf_counter(), job.train.xla_flags
    built = compile_with_flags(lower_program(job, program), program.execution.hardware, asked)
    recorder.message(f"the step compiled in {time.perf_counter() - began:.1f} s")
    if built.flags:
        recorder.message(f"compiler flags: {' '.join(f'{name}={value}' for name, value in built.flags.items())}")
    if built.unknown:
        recorder.message(f"this version's compiler does not know, and went without: {', '.join(built.unknown)}")
    return built.compiled


def check_same_data(metadata: dict[str, Any], dataset: Dataset, checkpoint: epath.Path) -> None:
    """Raises InputError where a checkpoint was trained on another dataset."""
    check_fingerprint(metadata["dataset"], dataset.index, dataset.directory, checkpoint)


def checkpoint_metadata(job: Job, dataset: Dataset, tokens: float) -> dict[str, Any]:
    return {"dataset": fingerprint(dataset.index), "tokens": tokens, "config": job.resolved, "versions": versions()}
