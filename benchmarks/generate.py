"""Greedy text from a decoder of 135 M parameters on a CPU: ``lmjax generate`` against transformers, in turn in one run.

    python -m benchmarks.generate [--model DIR]

The shape is SmolLM2-135M's with random weights, the same in both, in float32; or a Hugging Face directory with its own.
128 new tokens after prompts of 64, at batch 1 and 8, with two threads each (THREADS=1 in the environment: one, which
what else the machine does hardly disturbs). Both first have to write the same tokens; that call, with its compilation,
is not counted. Then they are timed in rounds, one after the other, and a ratio is the median over the rounds of the
tokens a second, ours by theirs; ``ratio`` is the smaller one. The peer is ``generate`` of LlamaForCausalLM as it comes,
in torch.inference_mode. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

THREADS = int(os.environ.get("THREADS", "2"))
PROMPT, NEW, BATCHES = 64, 128, (1, 8)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["OMP_NUM_THREADS"] = str(THREADS)
if hasattr(os, "sched_setaffinity"):  # XLA has a thread for each CPU that it may use
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-THREADS:])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from lmjax.convert.source import open_source  # noqa: E402
from lmjax.data.tokenizer import ByteTokenizer  # noqa: E402
from lmjax.generate.decode import Generator  # noqa: E402
from lmjax.generate.options import Options  # noqa: E402
from lmjax.mesh import single_device_mesh  # noqa: E402
from lmjax.models.counts import parameter_count  # noqa: E402
from lmjax.models.decoder import Execution  # noqa: E402
from lmjax.train.state import place_model  # noqa: E402

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100_000.0,
    "tie_word_embeddings": True,
}
Write = Callable[[np.ndarray], np.ndarray]
"""From prompts (rows, length) to the new tokens (rows, NEW)."""


class Endless(ByteTokenizer):
    """No token ends a text, and no text is made."""

    eos_id: int | None = None

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def decode(self, ids) -> str:
        return ""


def write_random_model(directory: str) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=None)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


def ours(directory: str) -> tuple[Write, int]:
    """What writes, and how many parameters it has."""
    source = open_source(Path(directory))
    model = place_model(source.config, single_device_mesh())
    params = source.place(model.params)
    execution = Execution(compute_dtype=jnp.dtype("float32"))
    generator = Generator(model, execution, Endless(source.config.vocab_size))
    options = Options(max_tokens=NEW, temperature=0.0)

    def write(prompts: np.ndarray) -> np.ndarray:
        return np.array([samples[0].tokens for samples in generator.generate(params, prompts.tolist(), options)])

    return write, parameter_count(source.config)


def theirs(directory: str) -> Write:
    torch.set_num_threads(THREADS)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    settings = {"do_sample": False, "min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0}

    def write(prompts: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(prompts)
        with torch.inference_mode():
            return model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings).numpy()[:, PROMPT:]

    return write


class Timing(NamedTuple):
    """Seconds of a call."""

    wall: float
    cpu: float
    """Of all threads: hardly changed by what else the machine does, but blind to threads that wait."""


def timed(write: Write, prompts: np.ndarray) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    write(prompts)
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="pairs that are timed at each batch size")
    parser.add_argument("--model", help="a Hugging Face directory; else one with random weights is made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            write_random_model(folder)
        our_write, parameters = ours(arguments.model or folder)
        their_write = theirs(arguments.model or folder)
    rng = np.random.default_rng(0)
    result: dict[str, object] = {"name": "generate"}
    for batch in BATCHES:
        prompts = rng.integers(0, 1000, (batch, PROMPT))
        same = (our_write(prompts) == their_write(prompts)).mean()
        print(f"batch {batch}: {same:.1%} of the tokens are the same", flush=True)
        if same < 0.5:  # two equally probable tokens may part the rest of a row
            sys.exit("the two do not compute the same: nothing is timed")
        pairs: list[tuple[Timing, Timing]] = []
        for number in range(arguments.rounds):
            order = (our_write, their_write) if number % 2 == 0 else (their_write, our_write)
            times = {write: timed(write, prompts) for write in order}
            pairs.append((times[our_write], times[their_write]))
            rates = [batch * NEW / timing.wall for timing in pairs[-1]]
            print("round {}: ours {:.1f}, transformers {:.1f} tokens/s".format(number, *rates), flush=True)
        result |= {
            f"batch{batch}_ratio": round(statistics.median(other.wall / our.wall for our, other in pairs), 3),
            f"batch{batch}_ratio_cpu": round(statistics.median(other.cpu / our.cpu for our, other in pairs), 3),
            f"batch{batch}_tokens_per_second": round(batch * NEW / statistics.median(our.wall for our, _ in pairs), 1),
        }
    result["ratio"] = min(value for name, value in result.items() if name.endswith("_ratio"))  # pyright: ignore
    result |= {
        "run": f"{NEW} new tokens after {PROMPT}, greedy, float32, {arguments.rounds} rounds",
        "parameters": parameters,
        "model": arguments.model or "random weights",
        "threads": THREADS,
        "load": round(os.getloadavg()[0], 1),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
