"""Attention of other libraries, for ``benchmarks.attention``: those that are installed and can do what is asked.

torch: ``scaled_dot_product_attention`` by each of its backends. flash-attn: ``flash_attn_func``. tokamax:
``dot_product_attention``, by the kernel of its choice. jax mosaic: the Hopper kernel among JAX's own examples, in
float16, which has no causal backward pass and no scale: queries are scaled before it.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Passes(NamedTuple):
    """An attention of given arrays, ready to be run; a run is over when its results are there."""

    forward: Callable[[], Any]
    both: Callable[[], Any] | None
    """(result, gradients of queries, keys and values); None where it has no backward pass."""


def peers(
    features: frozenset[str], window: int | None, given: list[jax.Array], scale: float
) -> Iterator[tuple[str, Callable[[], Passes]]]:
    """The names of those that can, and what makes their passes of (q, k, v, dout)."""
    is_gpu = jax.default_backend() == "gpu"
    q, *_ = given
    is_half = q.dtype in (jnp.bfloat16, jnp.float16)
    if features == {"causal"} and importlib.util.find_spec("torch"):
        backends = ("cudnn_attention", "flash_attention") if is_gpu else ("math",)
        for backend in backends:
            yield f"torch {backend}", lambda backend=backend: _torch(backend, given, scale)
    if features <= {"causal", "window"} and is_half and is_gpu and importlib.util.find_spec("flash_attn"):
        yield "flash-attn", lambda: _flash_attn(window, given, scale)
    if features <= {"causal", "window"} and is_gpu and importlib.util.find_spec("tokamax"):
        yield "tokamax", lambda: _tokamax(window, given, scale)
    if features == {"causal"} and is_half and is_gpu and q.shape[1] % 128 == 0 and q.shape[3] % 64 == 0:
        yield "jax mosaic", lambda: _jax_mosaic(given, scale)


def as_numpy(x: Any) -> np.ndarray:
    """An array of JAX, or of torch."""
    return np.asarray(x.astype("float32")) if isinstance(x, jax.Array) else x.detach().float().cpu().numpy()


def _of_torch(attend: Callable[..., Any], given: list[jax.Array]) -> Passes:
    import torch

    q, k, v, dout = (torch.from_dlpack(x) for x in given)
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))

    def finished(results):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return results

    def forward():
        with torch.no_grad():
            return finished(attend(q, k, v))

    def both():
        out = attend(q, k, v)
        return finished([out, *torch.autograd.grad(out, (q, k, v), dout)])

    return Passes(forward, both)


def _torch(backend: str, given: list[jax.Array], scale: float) -> Passes:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kind = getattr(SDPBackend, backend.upper())

    def attend(*rows):
        with sdpa_kernel(kind):
            out = torch.nn.functional.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in rows), is_causal=True, scale=scale, enable_gqa=True
            )
        return out.transpose(1, 2)

    return _of_torch(attend, given)


def _flash_attn(window: int | None, given: list[jax.Array], scale: float) -> Passes:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    sides = (-1, -1) if window is None else (window - 1, 0)
    return _of_torch(lambda *rows: flash_attn_func(*rows, softmax_scale=scale, causal=True, window_size=sides), given)


def _tokamax(window: int | None, given: list[jax.Array], scale: float) -> Passes:
    import tokamax  # pyright: ignore[reportMissingImports]

    sides = None if window is None else (window - 1, 0)

    def attend(q, k, v):
        return tokamax.dot_product_attention(q, k, v, scale=scale, is_causal=True, local_window_size=sides)

    return of_jax(attend, given)


def _jax_mosaic(given: list[jax.Array], scale: float) -> Passes:
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    q, k, v, _ = (x.astype("float16") for x in given)
    keys = 128 if q.shape[3] <= 128 else 64
    config = attention_mgpu.TuningConfig(block_q=64, block_kv=keys, max_concurrent_steps=2, causal=True)
    forward = jax.jit(lambda q, k, v: attention_mgpu.attention(q * jnp.float16(scale), k, v, config))
    forward = forward.lower(q, k, v).compile()
    return Passes(lambda: jax.block_until_ready(forward(q, k, v)), None)


def of_jax(attend: Callable[..., jax.Array], given: list[jax.Array]) -> Passes:
    """The passes of a function of (q, k, v), compiled."""

    def both(q, k, v, dout):
        out, pull_back = jax.vjp(attend, q, k, v)
        return [out, *pull_back(dout)]

    compiled_forward = jax.jit(attend).lower(*given[:3]).compile()
    compiled_both = jax.jit(both).lower(*given).compile()
    return Passes(
        lambda: jax.block_until_ready(compiled_forward(*given[:3])),
        lambda: jax.block_until_ready(compiled_both(*given)),
    )
