"""Training Llama-type models on one GPU: our step against transformers' Llama in PyTorch, with equal losses.

    python -m benchmarks.train_gpu --plot train.png    # 125M, 1B and 3B parameters, 2k and 8k tokens, packed and not
    python -m benchmarks.train_gpu --small             # tiny models in float32, anywhere: whether both run and agree

Parameters and moments are float32, compute is bfloat16. Both sides start from the same random parameters and get the
same batches; for five updates their losses have to agree, and then each is timed. A side has the GPU to itself, in a
process of its own, for all cases of a model. The peer is torch.compile'd, under autocast, with fused AdamW, and for
attention flash-attn if it is installed, else flex_attention for packed rows, and torch's
scaled_dot_product_attention for others. MFU counts products as ``lmjax.models.counts`` does: nothing for what is
computed again, half of the pairs under a causal mask, documents in a row not taken into account.

The last line is one JSON object: by case tokens/s, MFU and peak memory of both, and ``ratio``, ours over torch's.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.versions import versions
from lmjax.hardware import hardware_here, peak_flops
from lmjax.mesh import single_device_mesh
from lmjax.models.config import DecoderConfig
from lmjax.models.counts import parameter_count, training_flops
from lmjax.models.decoder import Execution
from lmjax.models.remat import RematConfig
from lmjax.ops.cross_entropy import LossOptions
from lmjax.optim import OptimizerConfig
from lmjax.sharding import batch_sharding
from lmjax.train.state import TrainState, make_blueprint
from lmjax.train.step import DeviceBatch, make_step

AGREED, TIMED = 5, 10
"""Updates whose losses are compared, and those that are timed."""
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}
"""Of the losses, relatively."""
CLIP_NORM = 1.0
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, schedule="constant", weight_decay=0.1, clip_norm=CLIP_NORM)
PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers", "flash-attn")


class Size(NamedTuple):
    """A model, and how many tokens an update of it has."""

    model: DecoderConfig
    tokens: int
    remat: str


def _llama(width: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int = 32768) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocab,
        max_length=8192,
        embed_dim=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_dim=mlp,
    )


SIZES = {
    "125m": Size(_llama(768, 12, 12, 12, 2048), 32768, "none"),
    "1b": Size(_llama(2048, 16, 32, 8, 8192), 16384, "none"),
    "3b": Size(_llama(3072, 28, 24, 8, 8192), 16384, "full"),
    "tiny": Size(_llama(32, 2, 4, 2, 64, vocab=128), 128, "none"),
}


def dtype_of(model: str) -> str:
    return "float32" if model == "tiny" else "bfloat16"


class Case(NamedTuple):
    """Rows of ``length`` tokens; packed ones have documents of an eighth of it."""

    length: int
    packed: bool

    def batches(self, size: Size) -> Iterator[DeviceBatch]:
        """NumPy arrays of (rows, length), the same in every process."""
        rows, rng = size.tokens // self.length, np.random.default_rng(self.length)
        document = self.length // 8 if self.packed else self.length
        places = np.broadcast_to(np.arange(self.length, dtype=np.int32), (rows, self.length))
        for _ in range(AGREED):
            tokens = rng.integers(0, size.model.vocab_size, (rows, self.length + 1)).astype(np.int32)
            weights = np.ones((rows, self.length), np.float32)
            fields: Any = tokens[:, :-1], tokens[:, 1:], places // document + 1, places % document, weights
            yield DeviceBatch(*fields)


def random_parameters(model: DecoderConfig) -> Any:
    """The tree of our parameters as float32 NumPy arrays, the same in every process."""
    blueprint = make_blueprint(model, OPTIMIZER, AGREED, single_device_mesh())
    rng = np.random.default_rng(0)

    def draw(path, like):
        drawn = rng.standard_normal(like.shape, np.float32)
        is_scale = jax.tree_util.keystr(path[-1:]).strip("[]'") == "scale"
        return 1 + 0.1 * drawn if is_scale else 0.02 * drawn

    return jax.tree_util.tree_map_with_path(draw, blueprint.state.params)


class Side(NamedTuple):
    """One of the two, for one case."""

    update: Callable[[int], Any]
    """The loss of one update on the batch of that number; nothing is waited for."""
    wait: Callable[[Any], float]
    """The loss as a number, when all is done."""
    peak_bytes: Callable[[], int | None]


def ours(size: Size, case: Case, params: Any, dtype: str, kernel: str) -> Side:
    mesh = single_device_mesh()
    blueprint = make_blueprint(size.model, OPTIMIZER, AGREED, mesh)
    execution = Execution(
        compute_dtype=jnp.dtype(dtype),
        attention_kernel=kernel,
        hardware=hardware_here(),
        remat=RematConfig(policy=size.remat),  # pyright: ignore[reportArgumentType]
    )
    step = jax.jit(make_step(blueprint, execution, LossOptions(chunk_tokens=min(4096, size.tokens))), donate_argnums=0)
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, blueprint.state.params)
    state = TrainState(jnp.zeros((), jnp.int32), placed, jax.jit(blueprint.optimizer.init)(placed))
    at = batch_sharding(mesh, num_leading=1)
    batches = [DeviceBatch(*(jax.device_put(x[None], at) for x in batch)) for batch in case.batches(size)]

    def update(number: int):
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = step(state, batches[number % AGREED])
        return metrics.loss

    def wait(loss):
        jax.block_until_ready(state)
        return float(loss)

    memory = jax.devices()[0].memory_stats
    return Side(update, wait, lambda: (memory() or {}).get("peak_bytes_in_use"))


def theirs(size: Size, case: Case, params: Any, dtype: str, *, small: bool) -> Side:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model, device = size.model, "cuda" if torch.cuda.is_available() else "cpu"
    settings: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "intermediate_size": model.mlp_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "max_position_embeddings": model.max_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": False,
        "attn_implementation": torch_attention(case, small=small),
    }
    config = LlamaConfig(**settings)
    with torch.device(device):
        llama = LlamaForCausalLM(config)
    llama.load_state_dict({name: torch.from_numpy(x) for name, x in of_transformers(params, model)}, strict=True)
    if size.remat == "full":
        llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    matrices = [p for p in llama.parameters() if p.ndim > 1]
    others = [p for p in llama.parameters() if p.ndim <= 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": OPTIMIZER.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=OPTIMIZER.learning_rate,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.epsilon,
        fused=True,
    )
    fields = [
        tuple(torch.from_numpy(np.ascontiguousarray(x)).long().to(device) for x in (b.tokens, b.targets, b.positions))
        for b in case.batches(size)
    ]

    def forward(tokens, targets, positions):
        logits = llama(input_ids=tokens, position_ids=positions, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    if not small:
        forward = torch.compile(forward)
    llama.train()

    def update(number: int):
        adamw.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=getattr(torch, dtype), enabled=dtype != "float32"):
            loss = forward(*fields[number % AGREED])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), CLIP_NORM, foreach=True)
        adamw.step()
        return loss.detach()

    def wait(loss):
        if device == "cuda":
            torch.cuda.synchronize()
        return float(loss)

    return Side(update, wait, lambda: torch.cuda.max_memory_allocated() if device == "cuda" else None)


def torch_attention(case: Case, *, small: bool) -> str:
    """transformers' name of what is fastest."""
    if not small and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    return "flex_attention" if case.packed and not small else "sdpa"


def of_transformers(params: Any, model: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters by the names of transformers' Llama, in its layouts."""
    D = model.embed_dim
    yield "model.embed_tokens.weight", params["embed"]["table"][: model.vocab_size]
    yield "lm_head.weight", params["head"]["table"][: model.vocab_size]
    yield "model.norm.weight", params["final_norm"]["scale"]
    group = params["segments"][0]["blocks"][0]
    for number in range(model.num_layers):
        block = jax.tree.map(lambda x, number=number: x[number], group)
        at = f"model.layers.{number}."
        yield f"{at}input_layernorm.weight", block["attention_norm"]["scale"]
        yield f"{at}post_attention_layernorm.weight", block["mlp_norm"]["scale"]
        for name, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            kernel = block["attention"][name]["kernel"]
            yield f"{at}self_attn.{theirs}_proj.weight", np.ascontiguousarray(kernel.reshape(D, -1).T)
        kernel = block["attention"]["out"]["kernel"]
        yield f"{at}self_attn.o_proj.weight", np.ascontiguousarray(kernel.reshape(-1, D).T)
        for name in ("gate", "up", "down"):
            yield f"{at}mlp.{name}_proj.weight", np.ascontiguousarray(block["mlp"][name]["kernel"].T)


def run_side(name: str, size_name: str, kernel: str) -> Iterator[dict[str, Any]]:
    """What one side makes of all cases of a model, each as soon as it is known."""
    small, size, dtype = size_name == "tiny", SIZES[size_name], dtype_of(size_name)
    params = random_parameters(size.model)
    for case in cases(small=small):
        told: dict[str, Any] = {"model": size_name, "length": case.length, "packed": case.packed}
        try:
            if name == "ours":
                side = ours(size, case, params, dtype, kernel)
            else:
                side = theirs(size, case, params, dtype, small=small)
            losses = [side.wait(side.update(number)) for number in range(AGREED)]
            began = time.perf_counter()
            for number in range(TIMED):
                loss = side.update(number)
            side.wait(loss)
            seconds = (time.perf_counter() - began) / TIMED
            rows = size.tokens // case.length
            peak = peak_flops(jax.devices()[0].device_kind) if name == "ours" else peak_flops(_torch_device())
            flops = training_flops(size.model, rows, case.length)
            told |= {
                "losses": losses,
                "tokens_per_second": round(size.tokens / seconds),
                "mfu": None if peak is None else round(flops / seconds / peak, 4),
                "peak_bytes": side.peak_bytes(),
            }
        except (RuntimeError, ValueError, ImportError) as error:  # the other cases are still to be measured
            told["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
        yield told


def _torch_device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def cases(*, small: bool) -> list[Case]:
    lengths = (64,) if small else (2048, 8192)
    return [Case(length, packed) for length in lengths for packed in (False, True)]


def of_process(side: str, size: str, kernel: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.train_gpu", "--side", side, "--models", size, "--kernel", kernel]
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if side == "torch" else {})
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}")
    return rows


def compared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A case as both sides told of it; there is a ratio where their losses agree."""
    found = {name: one[name] for name in ("model", "length", "packed")}
    for name, told in (("ours", one), ("torch", other)):
        found[name] = {key: value for key, value in told.items() if key not in found}
    if "error" in one or "error" in other:
        return found
    pairs = zip(one["losses"], other["losses"], strict=True)
    found["loss_difference"] = max(abs(mine / its - 1) for mine, its in pairs)
    if found["loss_difference"] <= TOLERANCES[dtype_of(one["model"])] and one["losses"][-1] != one["losses"][0]:
        found["ratio"] = round(one["tokens_per_second"] / other["tokens_per_second"], 4)
    return found


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """tokens/s of both sides, case by case."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "ratio" in row]
    figure = Figure(figsize=(max(4, 1.5 * len(rows)), 4), layout="constrained")
    ax, places = figure.subplots(), np.arange(len(rows))
    for shift, name in ((-0.2, "ours"), (0.2, "torch")):
        ax.bar(places + shift, [row[name]["tokens_per_second"] for row in rows], 0.4, label=name)
    names = [f"{row['model']}\n{row['length']}{' packed' if row['packed'] else ''}\n{row['ratio']}x" for row in rows]
    ax.set(ylabel="tokens/s", yscale="log", xticks=places, xticklabels=names)
    ax.legend()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["125m", "1b", "3b"])
    parser.add_argument("--kernel", default="auto", help="as train.attention_kernel, for our side")
    parser.add_argument("--small", action="store_true", help="tiny models in float32, on whatever there is")
    parser.add_argument("--plot", type=Path, help="draw tokens/s into this file (needs matplotlib)")
    parser.add_argument("--side", choices=["ours", "torch"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        for told in run_side(arguments.side, arguments.models[0], arguments.kernel):
            print(json.dumps(told), flush=True)
        return
    rows = []
    for size in ["tiny"] if arguments.small else arguments.models:
        sides = [of_process(side, size, arguments.kernel) for side in ("ours", "torch")]
        for one, other in zip(*sides, strict=True):
            rows.append(compared(one, other))
            print(rows[-1], file=sys.stderr, flush=True)
    if arguments.plot:
        draw(rows, arguments.plot)
    result = {
        "name": "train_gpu",
        "ratio": min((row["ratio"] for row in rows if "ratio" in row), default=None),
        "cases": rows,
        "parameters": {size: parameter_count(SIZES[size].model) for size in {row["model"] for row in rows}},
        "tokens": {size: SIZES[size].tokens for size in {row["model"] for row in rows}},
        "kernel": arguments.kernel,
        "device": _torch_device(),
        "versions": versions(*PACKAGES),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
