"""Training an 11 M parameter decoder on a CPU: our step against PyTorch's, in turn in one run.

    python -m benchmarks.cpu_vs_torch

16 rows of 256 tokens in float32, two threads each (THREADS=1 in the environment: one, which what else the machine does
hardly disturbs). From the same weights and on the same batches both first have to come to the same losses for five
updates. Then they are timed in rounds, one after the other, each after one update that is not counted, and the ratio is
the median over the rounds. The peer is torch.compile'd, with scaled_dot_product_attention and fused AdamW; its compiler
needs g++. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

# Memory in huge pages, for both: a step's buffers are given back to the system and taken anew, page by page. It is read
# when a process starts. `make quickstart` has it too.
HUGE_PAGES = "glibc.malloc.hugetlb=1"
if __name__ == "__main__" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.cpu_vs_torch", *sys.argv[1:]])

THREADS = int(os.environ.get("THREADS", "2"))
ROWS, LENGTH, STEPS = 16, 256, 5
LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-3, 0.1, 1.0

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["OMP_NUM_THREADS"] = str(THREADS)
if hasattr(os, "sched_setaffinity"):  # XLA has a thread for each CPU that it may use
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks import torch_decoder  # noqa: E402
from lmjax.mesh import single_device_mesh  # noqa: E402
from lmjax.models.counts import parameter_count  # noqa: E402
from lmjax.models.decoder import DecoderConfig, Execution  # noqa: E402
from lmjax.models.remat import RematConfig  # noqa: E402
from lmjax.ops.cross_entropy import LossOptions  # noqa: E402
from lmjax.optim import OptimizerConfig  # noqa: E402
from lmjax.sharding import batch_sharding  # noqa: E402
from lmjax.train.state import init_state, make_blueprint  # noqa: E402
from lmjax.train.step import DeviceBatch, make_step  # noqa: E402

MODEL = DecoderConfig(
    vocab_size=4096, max_length=LENGTH, embed_dim=384, num_layers=6, num_heads=6, mlp_dim=896, tie_embeddings=True
)
OPTIMIZER = OptimizerConfig(
    learning_rate=LEARNING_RATE, schedule="constant", weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM
)
Update = Callable[[np.ndarray, np.ndarray], float]
"""One update on tokens and targets; the loss. It returns when the update is done."""


def our_update(scan_layers: bool, remat: RematConfig, chunk_tokens: int) -> tuple[Update, dict]:
    """The update, and the parameters that it starts from as numpy arrays."""
    mesh = single_device_mesh()
    blueprint = make_blueprint(MODEL, OPTIMIZER, STEPS, mesh)
    execution = Execution(compute_dtype=jnp.dtype("float32"), remat=remat, scan_layers=scan_layers)
    step = jax.jit(make_step(blueprint, execution, LossOptions(chunk_tokens=chunk_tokens)), donate_argnums=0)
    state = init_state(blueprint, 0)
    initial = jax.device_get(state.params)
    sharding = batch_sharding(mesh, num_leading=1)

    def update(tokens: np.ndarray, targets: np.ndarray) -> float:
        nonlocal state
        positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
        fields = (tokens, targets, np.ones_like(tokens), positions, np.ones(tokens.shape, np.float32))
        batch = DeviceBatch(*(jax.device_put(field[None], sharding) for field in fields))
        with jax.set_mesh(mesh):
            state, metrics = step(state, batch)
        jax.block_until_ready(state)
        return float(metrics.loss)

    return update, initial


def torch_update(initial: dict) -> Update:
    torch.set_num_threads(THREADS)
    model = torch_decoder.TorchDecoder(MODEL)
    torch_decoder.copy_parameters(model, initial, MODEL)
    adamw = torch_decoder.make_adamw(
        model,
        learning_rate=LEARNING_RATE,
        beta1=OPTIMIZER.beta1,
        beta2=OPTIMIZER.beta2,
        epsilon=OPTIMIZER.epsilon,
        weight_decay=WEIGHT_DECAY,
    )

    @torch.compile
    def forward(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch_decoder.loss(model(tokens), targets)

    def update(tokens: np.ndarray, targets: np.ndarray) -> float:
        adamw.zero_grad(set_to_none=True)
        loss = forward(torch.from_numpy(tokens), torch.from_numpy(targets))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM, foreach=True)
        adamw.step()
        return float(loss.detach())

    return update


class Timing(NamedTuple):
    """Seconds an update."""

    wall: float
    cpu: float
    """Of all threads: hardly changed by what else the machine does, but blind to threads that wait."""


def timed(update: Update, batches: list[tuple[np.ndarray, np.ndarray]]) -> Timing:
    update(*batches[0])  # what the other one left in memory and caches is gone after it, as it is in a training run
    wall, cpu = time.perf_counter(), time.process_time()
    for batch in batches:
        update(*batch)
    return Timing((time.perf_counter() - wall) / len(batches), (time.process_time() - cpu) / len(batches))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="pairs that are timed")
    parser.add_argument("--steps", type=int, default=4, help="updates of each of the two in a round")
    parser.add_argument("--scan-layers", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--remat", default="none", choices=["none", "full", "dots", "attention"])
    parser.add_argument("--chunk-tokens", type=int, default=1024, help="train.loss_chunk_tokens")
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    rows = rng.integers(0, MODEL.vocab_size, (STEPS, ROWS, LENGTH + 1)).astype(np.int64)
    batches = [(np.ascontiguousarray(row[:, :-1]), np.ascontiguousarray(row[:, 1:])) for row in rows]
    ours_batches = [(tokens.astype(np.int32), targets.astype(np.int32)) for tokens, targets in batches]

    ours, initial = our_update(arguments.scan_layers, RematConfig(policy=arguments.remat), arguments.chunk_tokens)
    theirs = torch_update(initial)
    our_losses = [ours(*batch) for batch in ours_batches]
    their_losses = [theirs(*batch) for batch in batches]
    difference = max(abs(one / other - 1) for one, other in zip(our_losses, their_losses, strict=True))
    print("losses", our_losses, their_losses, f"largest relative difference {difference:.1e}")
    if difference > 1e-4 or our_losses[-1] == our_losses[0]:
        sys.exit("the two do not compute the same: nothing is timed")

    tokens = ROWS * LENGTH
    our_times: list[Timing] = []
    their_times: list[Timing] = []
    for number in range(arguments.rounds):
        order = [(ours, ours_batches, our_times), (theirs, batches, their_times)]
        for update, inputs, times in order if number % 2 == 0 else reversed(order):
            times.append(timed(update, inputs[: arguments.steps]))
        rates = tokens / our_times[-1].wall, tokens / their_times[-1].wall
        print("round {}: ours {:,.0f}, torch {:,.0f} tokens/s".format(number, *rates), flush=True)
    ratios = [theirs.wall / ours.wall for ours, theirs in zip(our_times, their_times, strict=True)]
    cpu_ratios = [theirs.cpu / ours.cpu for ours, theirs in zip(our_times, their_times, strict=True)]
    result = {
        "name": "cpu_vs_torch",
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "cpu_seconds_ratio": round(statistics.median(cpu_ratios), 4),
        "ours_tokens_per_second": round(tokens / statistics.median(timing.wall for timing in our_times)),
        "torch_tokens_per_second": round(tokens / statistics.median(timing.wall for timing in their_times)),
        "loss_difference": difference,
        "parameters": parameter_count(MODEL),
        "batch": f"{ROWS} x {LENGTH} tokens, float32",
        "threads": THREADS,
        "malloc": os.environ.get("GLIBC_TUNABLES"),
        "ours": vars(arguments),
        "torch": "torch.compile, scaled_dot_product_attention, fused AdamW",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "torch": torch.__version__},
        "cpu": _cpu(),
    }
    print(json.dumps(result))


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
