"""Where a training step on a CPU spends its time: each part of it, forward and backward, ours and PyTorch's.

    python -m benchmarks.cpu_profile

The shapes are those of ``benchmarks.cpu_vs_torch``. The parts are timed alone and in turn, so they do not add up to the
step exactly: fused into it, some cost less. Times are medians. The last line is one JSON object; its ratio is PyTorch's
seconds by ours, summed over the parts.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.cpu_vs_torch import LENGTH, MODEL, OPTIMIZER, ROWS, THREADS  # isort: skip (sets the threads of both)

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F

from benchmarks import torch_decoder
from lmjax.mesh import BATCH_AXES, single_device_mesh
from lmjax.nn.norm import Norm
from lmjax.nn.position import Rope
from lmjax.ops.attention import attention
from lmjax.ops.attention_mask import Mask
from lmjax.ops.cross_entropy import LossOptions, linear_cross_entropy
from lmjax.ops.lookup import lookup
from lmjax.optim import make_optimizer, make_schedule
from lmjax.sharding import batch_sharding

D, N, H, FF, V = MODEL.embed_dim, MODEL.num_heads, MODEL.head_width, MODEL.mlp_dim, MODEL.vocab_size
CHUNK_TOKENS = 1024


class Part(NamedTuple):
    """One part of the step."""

    name: str
    count: int
    """How often a step has it."""
    inputs: tuple[np.ndarray, ...]
    """Floating-point ones get a gradient."""
    ours: Callable[..., Any]
    theirs: Callable[..., Any]


def parts(rng: np.random.Generator) -> list[Part]:
    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    layers = MODEL.num_layers
    x, wide, heads = normal(ROWS, LENGTH, D), normal(ROWS, LENGTH, FF), normal(ROWS, LENGTH, N, H)
    tokens = rng.integers(0, V, (ROWS, LENGTH)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    mesh = single_device_mesh()
    weights, segment_ids = (
        jax.device_put(np.ones((ROWS, LENGTH), dtype), batch_sharding(mesh)) for dtype in (np.float32, np.int32)
    )
    norm = Norm("rms", (D,), MODEL.norm_epsilon)
    rope = Rope(width=H, theta=10_000.0)
    options = LossOptions(chunk_tokens=CHUNK_TOKENS)
    angles = torch.from_numpy(positions[:, None, :, None] * 10_000.0 ** -(np.arange(0, H, 2) / H)).float()
    rotation = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    def our_attention(q, k, v):
        return attention(q, k, v, mask=Mask(), segment_ids=segment_ids, scale=H**-0.5)

    def their_attention(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def our_loss(x, table, targets):
        return linear_cross_entropy(x, table, targets, weights, options, vocab_size=V).loss / (ROWS * LENGTH)

    return [
        Part(f"matrix product {D} x {D}", 4 * layers, (x, normal(D, D)), _product, torch.matmul),
        Part(f"matrix product {D} x {FF}", 2 * layers, (x, normal(D, FF)), _product, torch.matmul),
        Part(f"matrix product {FF} x {D}", layers, (wide, normal(FF, D)), _product, torch.matmul),
        Part("attention", layers, (heads, heads + 1, heads - 1), our_attention, their_attention),
        Part(
            "rotary position",
            2 * layers,
            (heads,),
            lambda x: rope.rotate(x, rope.rotation(jnp.asarray(positions))),
            torch.compile(lambda x: torch_decoder.rotate(x.transpose(1, 2), *rotation)),
        ),
        Part("silu(gate) * up", layers, (wide, wide + 1), lambda g, u: jax.nn.silu(g) * u, torch.compile(_gated)),
        Part("norm", 2 * layers + 1, (x,), norm, torch.compile(lambda x: F.rms_norm(x, (D,)))),
        Part("embedding", 1, (normal(V, D), tokens), lambda table, t: lookup(table, t, table.dtype), _embedding),
        Part("logits and loss", 1, (x, normal(V, D) / 20, tokens), our_loss, torch.compile(_loss)),
    ]


def _product(x, w):
    return jnp.einsum("btd,df->btf", x, w, out_sharding=jax.P(BATCH_AXES, None, None))


def _gated(gate, up):
    return F.silu(gate) * up


def _embedding(table, tokens):
    return F.embedding(tokens, table)


def _loss(x, table, targets):
    return F.cross_entropy((x @ table.T).flatten(0, 1), targets.flatten().long())


def our_runner(part: Part, mesh: jax.sharding.Mesh) -> Callable[[], None]:
    def spec(array: np.ndarray) -> jax.P:
        if array.shape[0] != ROWS:
            return jax.P("tensor", ("fsdp", "expert"))
        return jax.P(BATCH_AXES, None, "tensor", None) if array.ndim == 4 else jax.P(BATCH_AXES)

    floats = tuple(i for i, array in enumerate(part.inputs) if array.dtype == np.float32)
    inputs = [jax.device_put(array, jax.NamedSharding(mesh, spec(array))) for array in part.inputs]

    @jax.jit
    def forward_and_backward(inputs, cotangent):
        def result(*differentiated):
            every = list(inputs)
            for place, value in zip(floats, differentiated, strict=True):
                every[place] = value
            return part.ours(*every)

        out, backward = jax.vjp(result, *(inputs[i] for i in floats))
        return out, backward(cotangent)

    with jax.set_mesh(mesh):
        out = jax.jit(part.ours)(*inputs)
    # A random one: nothing may be simplified away.
    cotangent = jax.device_put(np.random.default_rng(1).standard_normal(out.shape, dtype=np.float32), out.sharding)

    def run() -> None:
        with jax.set_mesh(mesh):
            jax.block_until_ready(forward_and_backward(inputs, cotangent))

    return run


def their_runner(part: Part) -> Callable[[], None]:
    inputs = [torch.from_numpy(np.array(array)) for array in part.inputs]
    inputs = [tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in inputs]

    cotangent = torch.randn_like(part.theirs(*inputs))

    def run() -> None:
        for tensor in inputs:
            tensor.grad = None
        part.theirs(*inputs).backward(cotangent)

    return run


def optimizer_runners(rng: np.random.Generator) -> tuple[Callable[[], None], Callable[[], None]]:
    """Clipping and AdamW on matrices with as many parameters as the model has in its layers."""
    shapes = MODEL.num_layers * [(D, D)] * 4 + MODEL.num_layers * [(D, FF)] * 3 + [(V, D)]
    arrays = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    optimizer = make_optimizer(OPTIMIZER, make_schedule(OPTIMIZER, 10), [True] * len(arrays))
    params = [jnp.asarray(array) for array in arrays]
    grads = [jnp.asarray(array) for array in arrays]
    state = optimizer.init(params)

    def step(params, state):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    update = jax.jit(step, donate_argnums=(0, 1))

    def ours() -> None:
        nonlocal params, state
        params, state = jax.block_until_ready(update(params, state))

    tensors = [torch.nn.Parameter(torch.from_numpy(array.copy())) for array in arrays]
    for tensor, array in zip(tensors, arrays, strict=True):
        tensor.grad = torch.from_numpy(array.copy())
    adamw = torch.optim.AdamW(tensors, lr=1e-3, fused=True)

    def theirs() -> None:
        torch.nn.utils.clip_grad_norm_(tensors, 1.0, foreach=True)
        adamw.step()

    return ours, theirs


def timed(run: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="times that each part is run")
    arguments = parser.parse_args()
    rng, mesh = np.random.default_rng(0), single_device_mesh()
    torch.set_num_threads(THREADS)
    runners = [(part.name, part.count, our_runner(part, mesh), their_runner(part)) for part in parts(rng)]
    runners.append(("clipping and AdamW", 1, *optimizer_runners(rng)))
    table = []
    print("milliseconds of a step         ours   torch   (CPU seconds of all threads: ours, torch)")
    for name, count, ours, theirs in runners:
        for compiles in (ours, theirs):
            compiles()
        pairs = [(timed(ours), timed(theirs)) for _ in range(arguments.rounds)]
        columns = [[pair[side][kind] for pair in pairs] for kind in (0, 1) for side in (0, 1)]
        row = [round(1000 * count * statistics.median(column), 1) for column in columns]
        table.append({"part": name, "count": count, "ours_ms": row[0], "torch_ms": row[1], "ours_cpu_ms": row[2]})
        table[-1]["torch_cpu_ms"] = row[3]
        print("{:28} {:>6.0f}  {:>6.0f}   ({:.0f}, {:.0f})".format(f"{count} x {name}", *row), flush=True)
    result = {
        "name": "cpu_profile",
        "ratio": round(sum(row["torch_ms"] for row in table) / sum(row["ours_ms"] for row in table), 4),
        "parts": table,
        "batch": f"{ROWS} x {LENGTH} tokens, float32",
        "threads": THREADS,
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "torch": torch.__version__},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
