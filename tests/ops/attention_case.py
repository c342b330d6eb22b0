"""Random queries, keys, values, segments and extras, and what a kernel makes of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from lmjax.ops.attention_mask import Mask
from lmjax.ops.attention_reference import reference_attention

SCALE = 0.3


class Case(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    segment_ids: np.ndarray
    """Three documents and padding in the first row, other lengths in the others."""
    dout: np.ndarray
    prefix: np.ndarray
    """The first tokens of each document."""
    slopes: np.ndarray
    sinks: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """Which of a case's extras take part."""

    prefix: bool = False
    alibi: bool = False
    sinks: bool = False
    softcap: float | None = None

    def __str__(self) -> str:
        return "+".join(field.name for field in dataclasses.fields(self) if getattr(self, field.name)) or "plain"

    def extras(self, case: Case) -> dict[str, np.ndarray]:
        """The array arguments of a kernel, by their names in it."""
        arrays = {"prefix_BT": case.prefix, "slopes_N": case.slopes, "sinks_N": case.sinks}
        every = zip(arrays.items(), self.extras_wanted, strict=True)
        return {name: array for (name, array), is_wanted in every if is_wanted}

    @property
    def extras_wanted(self) -> tuple[bool, bool, bool]:
        """Of prefix, slopes and sinks."""
        return self.prefix, self.alibi, self.sinks

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.softcap is None else {"softcap": self.softcap}


PLAIN = Features()


def make_case(rng, *, batch=2, length=24, num_heads=4, num_kv_heads=2, head_dim=8) -> Case:
    q, dout = rng.normal(size=(2, batch, length, num_heads, head_dim)).astype(np.float32)
    k, v = rng.normal(size=(2, batch, length, num_kv_heads, head_dim)).astype(np.float32)
    segment_ids = np.zeros((batch, length), np.int32)
    prefix = np.zeros((batch, length), bool)
    for row in range(batch):
        cuts = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
        for number, (start, stop) in enumerate(zip([0, *cuts[:2]], cuts, strict=True), start=1):
            segment_ids[row, start:stop] = number
            prefix[row, start : (start + stop + 1) // 2] = True
    slopes = (0.1 + rng.random(num_heads)).astype(np.float32)
    sinks = rng.normal(size=num_heads).astype(np.float32)
    return Case(q, k, v, segment_ids, dout, prefix, slopes, sinks)


def forward_and_backward(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(q, k, v, segment_ids, dout, extras) to (out, dq, dk, dv), and dsinks where there are sinks."""

    def run(q, k, v, segment_ids, dout, extras=None):
        extras = dict(extras or {})
        sinks = {name: extras.pop(name) for name in ("sinks_N", "sinks") if name in extras}

        def apply(q, k, v, sinks):
            return attend(q, k, v, segment_ids, **extras, **sinks)

        out, pull_back = jax.vjp(apply, q, k, v, sinks)
        *gradients, dsinks = pull_back(dout)
        return out, *gradients, *dsinks.values()

    return run


def run_kernel(kernel, case: Case, mask: Mask, *, segmented: bool = True, features: Features = PLAIN, **options) -> Any:
    """The kernel alone, on one device without a mesh."""
    attend = functools.partial(kernel, mask=mask, scale=SCALE, **features.options, **options)
    return jax.jit(forward_and_backward(attend))(
        case.q, case.k, case.v, case.segment_ids if segmented else None, case.dout, features.extras(case)
    )


def run_reference(case: Case, mask: Mask, *, segmented: bool = True, features: Features = PLAIN) -> Any:
    return run_kernel(reference_attention, case, mask, segmented=segmented, features=features)
