"""What a run costs beside its updates: the loop of ``lmjax train`` against the bare jitted step, in turn.

    python -m benchmarks.overhead

The quickstart's model and batch on a generated text: the loop reads rows, places them on the device, fetches and writes
metrics; the bare step is given the same batch again and again. Both are timed over the same number of updates, without
compilation, evaluation and checkpoint. The last line is one JSON object; its ratio is the median over the pairs of the
bare step's seconds by the loop's.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from lmjax.cli.run_directory import to_job
from lmjax.config import load
from lmjax.data.prepare import prepare
from lmjax.train.job import Job, make_program, open_dataset
from lmjax.train.loop import batch_maker, run
from lmjax.train.state import init_state
from lmjax.train.step import make_step

WARM = 5
"""Updates before the timed ones."""


def write_corpus(directory: Path) -> None:
    """Half a megabyte of made-up prose."""
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + letter) for letter in rng.integers(0, 26, size)) for size in rng.integers(2, 10, 2000)]
    directory.mkdir()
    for number in range(100):
        (directory / f"{number}.txt").write_text(" ".join(rng.choice(words, 800)))


def make_job(directory: Path, name: str, steps: int) -> Job:
    sources = f"[{{kind: files, path: {directory / 'text'}}}]"
    overrides = [
        f"run_dir={directory / name}",
        "tokenizer={kind: bytes}",
        f"data={{path: {directory / 'dataset'}, sources: {sources}, sequence_length: 256, num_workers: 1}}",
        f"train.steps={steps}",
        f"evaluate={{every_steps: {steps}, max_rows: 8}}",
        f"checkpoint.every_steps={steps}",
        "logging.progress=lines",
    ]
    config = load("configs/quickstart.yaml", overrides)
    if not (directory / "dataset" / "index.json").exists():
        prepare(config.data, config.tokenizer)
    (directory / name).mkdir()
    return to_job(config)


def loop_seconds(job: Job) -> float:
    """Seconds an update of a whole run, by its own metrics."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        run(job)
    rows = [json.loads(line) for line in (Path(job.run_dir) / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["step_seconds"] for row in rows if "step_seconds" in row]
    assert len(seconds) == job.train.steps, (len(seconds), job.train.steps)
    return statistics.fmean(seconds[WARM:])


class BareStep:
    """The same step, compiled once, on one batch that is already on the device."""

    def __init__(self, job: Job):
        self.program = make_program(job)
        step = make_step(self.program.blueprint, self.program.execution, self.program.loss)
        self.batch = batch_maker(job, open_dataset(job), self.program.mesh)(0)
        state = init_state(self.program.blueprint, 0)
        with jax.set_mesh(self.program.mesh):
            self.step = jax.jit(step, donate_argnums=0).lower(state, self.batch).compile()

    def seconds(self, steps: int) -> float:
        state = init_state(self.program.blueprint, 0)
        began = 0.0
        for number in range(steps):
            if number == WARM:
                jax.block_until_ready(state)
                began = time.perf_counter()
            state, _ = self.step(state, self.batch)
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / (steps - WARM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="runs of each of the two")
    parser.add_argument("--steps", type=int, default=45, help=f"updates of a run, of which {WARM} are not timed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        jax.config.update("jax_compilation_cache_dir", str(directory / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        write_corpus(directory / "text")
        bare = BareStep(make_job(directory, "bare", arguments.steps))
        ratios, loop_times, bare_times = [], [], []
        for number in range(arguments.pairs):
            job = make_job(directory, f"run-{number}", arguments.steps)
            if number % 2 == 0:
                loop_times.append(loop_seconds(job))
                bare_times.append(bare.seconds(arguments.steps))
            else:
                bare_times.append(bare.seconds(arguments.steps))
                loop_times.append(loop_seconds(job))
            ratios.append(bare_times[-1] / loop_times[-1])
            print(f"pair {number}: loop {loop_times[-1]:.4f} s, bare step {bare_times[-1]:.4f} s an update", flush=True)
    result = {
        "name": "overhead",
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "loop_seconds": round(statistics.median(loop_times), 5),
        "bare_seconds": round(statistics.median(bare_times), 5),
        "run": f"quickstart's model, 8 x 256 tokens, {arguments.steps - WARM} updates timed in each run",
        "cpus": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
