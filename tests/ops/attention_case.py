"""Random queries, keys, values and segments, and what a kernel makes of them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from lmjax.ops.attention_mask import Mask
from lmjax.ops.attention_reference import reference_attention


class Case(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    segment_ids: np.ndarray
    """Three documents and padding in the first row, other lengths in the others."""
    dout: np.ndarray


def make_case(rng, *, batch=2, length=24, num_heads=4, num_kv_heads=2, head_dim=8) -> Case:
    q, dout = rng.normal(size=(2, batch, length, num_heads, head_dim)).astype(np.float32)
    k, v = rng.normal(size=(2, batch, length, num_kv_heads, head_dim)).astype(np.float32)
    segment_ids = np.zeros((batch, length), np.int32)
    for row in range(batch):
        cuts = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
        for number, (start, stop) in enumerate(zip([0, *cuts[:2]], cuts, strict=True), start=1):
            segment_ids[row, start:stop] = number
    return Case(q, k, v, segment_ids, dout)


def forward_and_backward(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(q, k, v, segment_ids, dout) to (out, dq, dk, dv)."""

    def run(q, k, v, segment_ids, dout):
        out, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, segment_ids), q, k, v)
        return out, *pull_back(dout)

    return run


def run_kernel(kernel, case: Case, mask: Mask, *, segmented: bool = True, **options) -> Any:
    """The kernel alone, on one device without a mesh."""
    attend = functools.partial(kernel, mask=mask, scale=0.3, **options)
    return jax.jit(forward_and_backward(attend))(
        case.q, case.k, case.v, case.segment_ids if segmented else None, case.dout
    )


def run_reference(case: Case, mask: Mask, *, segmented: bool = True) -> Any:
    return run_kernel(reference_attention, case, mask, segmented=segmented)
