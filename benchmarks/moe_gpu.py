"""A layer of experts on one GPU, in every form that there is, against a dense MLP with the same operations a token.

    python -m benchmarks.moe_gpu            # Mixtral-8x7B's sizes and 16384 tokens in bfloat16
    python -m benchmarks.moe_gpu --small    # anywhere, in seconds: whether all of it runs and agrees

Value and all gradients, parameters and activations in one dtype, nothing dropped, from equal parameters. The forms are
this project's layer with each of its grouped products, the same with tokamax's (where that is installed), and
transformers' Mixtral block, as it is and with torch's grouped products (where both are installed). All are timed in
turn, round after round. The last line is one JSON object: by form the median seconds, ``ratio`` of the dense MLP's to
them (1 / 1.15 = 0.87 is the goal), TFLOP/s, and ``difference``, the root mean square of what it gives less what the
layer gives with blocks, by that of the latter. A form that fails has its error there instead.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "")  # whatever there is; benchmarks.moe would take the CPU
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")  # torch allocates beside it

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.moe import MOE, Sizes, layers, on_mesh, value_and_gradients
from benchmarks.versions import versions
from lmjax.hardware import hardware_here
from lmjax.mesh import BATCH_AXES, single_device_mesh
from lmjax.nn.execution import LayerExecution
from lmjax.ops import grouped_matmul

MIXTRAL = Sizes(4, 4096, 4096, 14336)
SMALL = Sizes(2, 32, 16, 32)
PACKAGES = ("jax", "jaxlib", "tokamax", "torch", "transformers")


class Form(NamedTuple):
    """One way to compute the layer."""

    run: Callable[[], Any]
    """Value and gradients, of which nothing is waited for."""
    wait: Callable[[Any], object]
    output: Callable[[], np.ndarray]
    """float32 (sequences, length, width)."""


class Inputs(NamedTuple):
    """The same for all forms, float32 on the host."""

    x: np.ndarray
    weights: np.ndarray
    """Of the output, whose weighted sum is differentiated."""
    params: dict[str, Any]
    """Of the layer of experts."""


def jax_form(name: str, sizes: Sizes, inputs: Inputs, dtype: str, grouped: str | None) -> Form:
    """The dense MLP, or the layer with the grouped product of that name."""
    mesh = single_device_mesh()
    execution = LayerExecution(compute_dtype=jnp.dtype(dtype), hardware=hardware_here())
    place = NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, None))
    graphdef, variables = nnx.split(layers(sizes)[name]())
    if grouped is not None:
        variables = jax.tree.map(lambda _, value: value, nnx.to_pure_dict(variables), inputs.params)
    layer = on_mesh(
        nnx.merge(graphdef, variables),
        mesh,
        lambda value, at: jax.device_put(value.astype(execution.compute_dtype), at),
    )
    x, weights = (jax.device_put(array.astype(execution.compute_dtype), place) for array in inputs[:2])
    differentiate, forward = value_and_gradients(execution), _output(execution)

    def within(function: Callable[..., Any], *arguments: Any) -> Any:
        grouped_matmul.BY_PLATFORM = {} if grouped is None else {execution.hardware.platform: grouped}  # pyright: ignore
        with jax.set_mesh(mesh):
            return function(layer, *arguments)

    return Form(
        run=functools.partial(within, differentiate, x, weights),
        wait=jax.block_until_ready,
        output=lambda: np.asarray(within(forward, x), np.float32),
    )


def _output(execution: LayerExecution) -> Callable[..., jax.Array]:
    def output(layer, x):
        return layer(x, jnp.ones(x.shape[:2], bool, out_sharding=PartitionSpec(BATCH_AXES, None)), execution)[0]

    return jax.jit(output)


def torch_form(sizes: Sizes, inputs: Inputs, dtype: str, implementation: str) -> Form:
    """transformers' block with one of its ways to go through the experts."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = MixtralConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_local_experts=MOE.num_experts,
        num_experts_per_tok=MOE.experts_per_token,
    )
    config._experts_implementation = implementation
    kind = getattr(torch, dtype)

    def tensor(array: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, kind)

    with torch.device("meta"):
        block = MixtralSparseMoeBlock(config)
    gate, up, down = (inputs.params[name]["kernel"].swapaxes(1, 2) for name in ("gate", "up", "down"))
    parameters = {
        "gate.weight": inputs.params["router"]["matrix"].T,
        "experts.gate_up_proj": np.concatenate([gate, up], axis=1),
        "experts.down_proj": down,
    }
    block.load_state_dict({name: tensor(array) for name, array in parameters.items()}, assign=True)
    x, weights = tensor(inputs.x).requires_grad_(), tensor(inputs.weights)

    def run() -> None:
        block.zero_grad()
        x.grad = None
        (block(x) * weights).sum().backward()

    def wait(_: None) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def output() -> np.ndarray:
        with torch.no_grad():
            return block(x).float().cpu().numpy()

    return Form(run, wait, output)


def forms(sizes: Sizes, inputs: Inputs, dtype: str) -> Iterator[tuple[str, Callable[[], Form]]]:
    yield "dense", lambda: jax_form("dense", sizes, inputs, dtype, None)
    for grouped in grouped_matmul.IMPLEMENTATIONS:
        yield grouped, functools.partial(jax_form, "experts", sizes, inputs, dtype, grouped)
    for implementation in ("eager", "grouped_mm"):
        yield f"transformers {implementation}", functools.partial(torch_form, sizes, inputs, dtype, implementation)


def add_tokamax() -> None:
    """As one of the grouped products, where it is installed."""
    try:
        import tokamax  # pyright: ignore[reportMissingImports]
    except ImportError:
        return

    def product(x, w, sizes):
        return tokamax.ragged_dot(x, w, group_sizes=sizes, preferred_element_type=x.dtype)

    grouped_matmul.IMPLEMENTATIONS = {**grouped_matmul.IMPLEMENTATIONS, "tokamax": product}  # pyright: ignore


def make_inputs(sizes: Sizes) -> Inputs:
    rng = np.random.default_rng(0)
    shape = (sizes.sequences, sizes.length, sizes.width)
    _, variables = nnx.split(jax.eval_shape(layers(sizes)["experts"]))

    def draw(path: Any, like: Any) -> np.ndarray:
        scale = 0.5 if path[-1].key == "matrix" else 0.02  # clear choices: a tie is decided by what is rounded away
        return rng.standard_normal(like.shape, dtype=np.float32) * np.float32(scale)

    params = jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(variables))
    x, weights = rng.standard_normal((2, *shape), dtype=np.float32)
    return Inputs(x, weights, params)


def measure(sizes: Sizes, dtype: str, rounds: int) -> dict[str, dict[str, Any]]:
    inputs = make_inputs(sizes)
    ready: dict[str, Form] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, make in forms(sizes, inputs, dtype):
        try:
            form = make()
            form.wait(form.run())  # compiled, and not timed
            found[name] = {} if name == "dense" else {"output": form.output()}
            ready[name] = form
        except Exception as error:  # noqa: BLE001 (what one form raises is its result; the others are measured)
            found[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for number in range(rounds):
        for name in sorted(ready, reverse=number % 2 == 1):
            began = time.perf_counter()
            ready[name].wait(ready[name].run())
            seconds[name].append(time.perf_counter() - began)
    tokens = sizes.sequences * sizes.length
    operations = 3 * 2 * tokens * MOE.experts_per_token * 3 * sizes.width * sizes.hidden
    expected = found["blocks"].get("output")
    for name, times in seconds.items():
        of_form, median = found[name], statistics.median(times)
        ratio = statistics.median(dense / time for dense, time in zip(seconds["dense"], times, strict=True))
        told = {"seconds": round(median, 6), "ratio": round(ratio, 4), "tflops": round(operations / median / 1e12, 2)}
        if (output := of_form.pop("output", None)) is not None and expected is not None:
            difference = np.sqrt(np.mean((output - expected) ** 2) / np.mean(expected**2))
            told["difference"] = float(f"{difference:.3g}")
        found[name] = told
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="timed runs of each form")
    parser.add_argument("--small", action="store_true", help="tiny sizes in float32, on whatever there is")
    arguments = parser.parse_args()
    if not arguments.small and jax.default_backend() != "gpu":
        parser.error(f"JAX finds no GPU here but {jax.default_backend()}; --small runs anywhere")
    sizes, dtype = (SMALL, "float32") if arguments.small else (MIXTRAL, "bfloat16")
    add_tokamax()
    result = {
        "name": "moe_gpu",
        "forms": measure(sizes, dtype, arguments.rounds),
        "run": {**sizes._asdict(), "experts": MOE.num_experts, "choices": MOE.experts_per_token, "dtype": dtype},
        "device": jax.devices()[0].device_kind,
        "versions": versions(*PACKAGES),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
