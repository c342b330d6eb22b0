"""Our attention kernels run on the hardware here beside the reference, and this machine's record of those that agreed.

Legend: B batch, T positions, N query heads, K kv heads, H head_dim.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.compat import coordination_client
from lmjax.hardware import Hardware
from lmjax.ops.attention_mask import Mask
from lmjax.ops.attention_reference import reference_attention

ROWS, LENGTH, HEADS, KV_HEADS = 2, 1000, 4, 2

DIMS = ((64, 64), (80, 80), (96, 96), (112, 112), (128, 128), (192, 128), (192, 192), (256, 256))
"""Of keys and values: those of published models."""

TOLERANCE = 1.5
"""How much larger than the reference's own error that of a kernel may be, as a root mean square.

Flash attention makes gradients from its rounded result, and rounds weights that the reference has in float32.
"""


class Check(NamedTuple):
    """One attention that a kernel is asked for."""

    name: str
    dims: tuple[int, int]
    """Of keys and of values."""
    dtype: str
    mask: Mask = Mask()
    arguments: frozenset[str] = frozenset()
    """Of segments, prefix, alibi, sinks and softcap those that take part."""


class Outcome(NamedTuple):
    """What a kernel made of a check."""

    check: Check
    ratios: tuple[float, ...]
    """Its errors by the reference's, of the result and the gradients of queries, keys and values."""

    @property
    def agrees(self) -> bool:
        return all(ratio <= TOLERANCE for ratio in self.ratios)  # NaN is not


def checks(dtypes: frozenset[str]) -> Iterator[Check]:
    """Every feature alone, and all that go together with every kind of head that is recorded."""
    every = frozenset({"segments", "alibi", "sinks", "softcap"})
    for dtype in sorted(dtypes & {"bfloat16", "float16"}):
        check = functools.partial(Check, dtype=dtype)
        yield check("causal", (128, 128))
        yield check("bidirectional", (128, 128), mask=Mask(causal=False))
        yield check("window", (128, 128), mask=Mask(window=LENGTH // 3))
        for feature in sorted(every | {"prefix"}):
            yield check(feature, (128, 128), arguments=frozenset({feature}))
        for dims in DIMS:
            yield check("window and all", dims, mask=Mask(window=LENGTH // 3), arguments=every)
            yield check("prefix and all", dims, arguments=every | {"prefix"})


def outcome(attend: Callable[..., jax.Array], check: Check) -> Outcome:
    """Of a kernel with the signature of ``reference_attention``; raises what the kernel raises."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), check.dtype)

    key_dim, value_dim = check.dims
    q, k, v, dout = (
        normal(ROWS, LENGTH, *sizes)
        for sizes in ((HEADS, key_dim), (KV_HEADS, key_dim), (KV_HEADS, value_dim), (HEADS, value_dim))
    )
    extras, segment_ids = _arguments(check, rng)

    def gradients(attend, precision, dtype):
        def attended(q, k, v):
            scale = key_dim**-0.5
            return attend(q, k, v, segment_ids, **extras, mask=check.mask, scale=scale)

        @jax.jit
        def run(q, k, v, dout):
            out, pull_back = jax.vjp(attended, q, k, v)
            return out, *pull_back(dout)

        with jax.default_matmul_precision(precision):
            return [np.asarray(x, np.float32) for x in run(*(x.astype(dtype) for x in (q, k, v, dout)))]

    truth = gradients(reference_attention, "highest", "float32")
    references = _errors(gradients(reference_attention, "default", check.dtype), truth)
    ours = _errors(gradients(attend, "default", check.dtype), truth)
    return Outcome(check, tuple(error / reference for error, reference in zip(ours, references, strict=True)))


def _arguments(check: Check, rng: np.random.Generator) -> tuple[dict[str, Any], jax.Array | None]:
    """Those that a kernel takes by name, and the segments: five documents and padding."""
    cuts = np.sort(rng.choice(np.arange(1, LENGTH), (ROWS, 5)), axis=1)
    ids_BT = (np.arange(LENGTH)[None, :, None] >= cuts[:, None, :]).sum(-1).astype(np.int32)
    ids_BT = np.where(ids_BT == 5, 0, ids_BT + 1).astype(np.int32)
    starts_BT = np.maximum.accumulate(np.where(np.diff(ids_BT, prepend=-1) != 0, np.arange(LENGTH), 0), axis=1)
    if "segments" not in check.arguments:
        starts_BT = np.zeros_like(starts_BT)
    every = {
        "prefix": ("prefix_BT", jnp.asarray(np.arange(LENGTH) - starts_BT < 40)),
        "alibi": ("slopes_N", jnp.asarray(2.0 ** -np.arange(1, HEADS + 1), jnp.float32)),
        "sinks": ("sinks_N", jnp.asarray(rng.standard_normal(HEADS), jnp.float32)),
        "softcap": ("softcap", 5.0),
    }
    extras = dict(pair for name, pair in every.items() if name in check.arguments)
    return extras, jnp.asarray(ids_BT) if "segments" in check.arguments else None


def _errors(found: list[np.ndarray], truth: list[np.ndarray]) -> list[float]:
    return [float(np.sqrt(np.square(x - y).mean())) for x, y in zip(found, truth, strict=True)]


def record(name: str, hardware: Hardware, agreed: Iterable[Check]) -> Path:
    """Note that all checks of a kernel agreed on ``hardware``, for the versions that there are now; where it stands."""
    file = _record_file()
    found = _records()
    heads = sorted({_heads(check.dtype, *check.dims) for check in agreed})
    found.setdefault(name, {})[str(hardware)] = {"versions": _versions(), "heads": heads}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1))
    return file


def is_recorded(name: str, hardware: Hardware, dtype: str, key_dim: int, value_dim: int) -> bool:
    """Whether a kernel agreed here on ``hardware`` for such heads, with the code and the JAX that there are now.

    Never in a run of several processes, whose machines may have other records: all have to choose the same kernel.
    """
    found = _records().get(name, {}).get(str(hardware), {})
    is_current = coordination_client() is None and found.get("versions") == _versions()
    return is_current and _heads(dtype, key_dim, value_dim) in found["heads"]


def _heads(dtype: str, key_dim: int, value_dim: int) -> str:
    return f"{dtype} {key_dim}" + (f" to {value_dim}" if value_dim != key_dim else "")


def _record_file() -> Path:
    from lmjax.paths import cache_root  # needs more than JAX, which kernels alone do not

    return cache_root() / "validated_kernels.json"


def _records() -> dict[str, Any]:
    try:
        return json.loads(_record_file().read_text())
    except (OSError, ValueError):
        return {}


@functools.cache
def _versions() -> dict[str, str]:
    """Of what a kernel's program comes from."""
    sources = sorted(Path(__file__).parent.glob("attention*.py"))
    return {"jax": jax.__version__, "code": hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()}
