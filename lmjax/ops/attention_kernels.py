"""The table of attention kernels: what each one has and where it runs. It makes the choice, the errors and the docs."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from lmjax.errors import InputError
from lmjax.hardware import PLATFORMS, Hardware
from lmjax.ops.attention_chunked import chunked_attention
from lmjax.ops.attention_cudnn import cudnn_attention
from lmjax.ops.attention_flash_hopper import flash_attention_hopper, hopper_visits
from lmjax.ops.attention_flash_tpu import flash_attention_tpu, flash_visits
from lmjax.ops.attention_flash_tpu_tiles import TILINGS
from lmjax.ops.attention_mask import Mask
from lmjax.ops.attention_reference import reference_attention
from lmjax.ops.attention_splash import LANES, splash_attention
from lmjax.ops.attention_validation import is_recorded

REFERENCE_LENGTH = 1024
"""Up to this many positions ``auto`` prefers all scores of a row at once to blocks of them: memory bears it."""

FEATURES = frozenset({"causal", "bidirectional", "window", "segments", "prefix", "softcap", "alibi", "sinks"})
DTYPES = frozenset({"float32", "bfloat16", "float16"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an attention asks of a kernel."""

    features: frozenset[str]
    """Of FEATURES."""
    hardware: Hardware
    length: int
    """Positions of a row."""
    head_dim: int
    value_dim: int
    dtype: str
    """Of queries, keys and values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """What a kernel is and can do."""

    attend: Callable[..., jax.Array]
    """Attention of one device's rows and heads; the signature of ``reference_attention``."""
    summary: str
    """What speaks for it."""
    features: frozenset[str]
    """Those of FEATURES that it has."""
    hardware: frozenset[str]
    """Platforms and generations where it runs."""
    visits: Callable[..., Any] | None = None
    """What it finds out of segment ids and prefixes, given its mask; ``attend`` takes the result as ``visits``."""
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Further keyword arguments of ``attend`` and ``visits`` on a platform or a generation."""
    dtypes: frozenset[str] = DTYPES
    head_dims: range | None = None
    """None: any; these are the dimensions of keys and of values."""
    needs_equal_dims: bool = False
    """Whether values are as long as keys."""
    length_multiple: int = 1
    """What the length of a row has to be a multiple of."""
    validation: str | None = None
    """What shows that it computes what it should on this hardware, for kernels of ours."""
    is_validated: bool = True
    """Whether that is enough for ``auto`` to take it, where this machine has no record of its own."""

    def objection(self, wanted: Wanted) -> str | None:
        """Why it cannot do what is wanted; None if it can."""
        if missing := wanted.features - self.features:
            return f"does not have {', '.join(sorted(missing))}"
        if not wanted.hardware.is_one_of(self.hardware):
            return f"runs on {', '.join(sorted(self.hardware))} only, not on {wanted.hardware}"
        if wanted.dtype not in self.dtypes:
            return f"takes {', '.join(sorted(self.dtypes))}, not {wanted.dtype}"
        dims = wanted.head_dim, wanted.value_dim
        if self.head_dims is not None and not set(dims) <= set(self.head_dims):
            return f"takes head_dim {self.head_dims_text}, not {' and '.join(map(str, dict.fromkeys(dims)))}"
        if self.needs_equal_dims and wanted.head_dim != wanted.value_dim:
            return f"takes values as long as keys, not {wanted.value_dim} and {wanted.head_dim}"
        if wanted.length % self.length_multiple:
            return f"takes rows of a multiple of {self.length_multiple} positions, not {wanted.length}"
        return None

    def options_on(self, hardware: Hardware) -> dict[str, Any]:
        """Those of its platform and of its generation."""
        return {**self.options.get(hardware.platform, {}), **self.options.get(str(hardware), {})}

    @property
    def head_dims_text(self) -> str:
        dims = self.head_dims
        return "any" if dims is None else f"{dims.start} to {dims[-1]} in steps of {dims.step}"


KERNELS: dict[str, Kernel] = {
    "reference": Kernel(
        attend=reference_attention,
        summary="all scores of a row at once",
        features=FEATURES,
        hardware=frozenset(PLATFORMS),
        options={"cpu": {"block": 64}},  # what is computed with stays in the cache, and half of it is left out
    ),
    "chunked": Kernel(
        attend=chunked_attention,
        summary="blocks of scores, memory linear in the length",
        features=FEATURES,
        hardware=frozenset(PLATFORMS),
        options={"cpu": {"block": 64}},
    ),
    "splash": Kernel(
        attend=splash_attention,
        summary="JAX's block-sparse kernel for TPU",
        features=FEATURES - {"prefix", "alibi", "sinks"},
        hardware=frozenset({"tpu"}),
        dtypes=frozenset({"float32", "bfloat16"}),
        length_multiple=LANES,
    ),
    "flash_tpu": Kernel(
        attend=flash_attention_tpu,
        visits=flash_visits,
        summary="our kernel for TPU, which visits the tiles that mask, window and documents leave",
        features=FEATURES,
        hardware=frozenset(f"tpu {generation}" for generation in TILINGS),
        dtypes=frozenset({"float32", "bfloat16"}),
        head_dims=range(8, 257, 8),
        options={f"tpu {generation}": {"generation": generation} for generation in TILINGS},
        validation="interpreted against the reference, compiled for each generation; run on none",
    ),
    "flash_hopper": Kernel(
        attend=flash_attention_hopper,
        visits=hopper_visits,
        summary="our kernel for Hopper, which visits the tiles that mask, window and documents leave",
        features=FEATURES,
        hardware=frozenset({"gpu hopper"}),
        dtypes=frozenset({"bfloat16", "float16"}),
        head_dims=range(8, 257, 8),
        validation="interpreted against the reference, compiled for an H200; run on none",
        is_validated=False,
    ),
    "cudnn": Kernel(
        attend=cudnn_attention,
        summary="NVIDIA's kernel, through jax.nn.dot_product_attention",
        features=frozenset({"causal", "bidirectional", "window"}),
        hardware=frozenset({"gpu ampere", "gpu ada", "gpu hopper", "gpu blackwell"}),
        dtypes=frozenset({"bfloat16", "float16"}),
        head_dims=range(8, 129, 8),
        needs_equal_dims=True,
        length_multiple=2,
    ),
}
"""By the names that ``train.attention_kernel`` takes."""


PREFERRED = {"tpu": ("splash", "flash_tpu"), "gpu": ("cudnn", "flash_hopper")}
"""The kernels that ``auto`` tries on a platform before the plain forms."""


class Choice(NamedTuple):
    """A kernel's name, and why it is this one."""

    name: str
    why: str


def wanted_features(
    mask: Mask,
    *,
    segments: bool = False,
    prefix: bool = False,
    softcap: bool = False,
    alibi: bool = False,
    sinks: bool = False,
) -> frozenset[str]:
    """Those of FEATURES that an attention with ``mask`` and these arguments needs."""
    named = {
        "window": mask.window is not None,
        "segments": segments,
        "prefix": prefix,
        "softcap": softcap,
        "alibi": alibi,
        "sinks": sinks,
    }
    return frozenset(
        {"causal" if mask.causal else "bidirectional"} | {name for name, is_used in named.items() if is_used}
    )


def choose_kernel(kernel: str, wanted: Wanted) -> Choice:
    """The kernel that ``kernel`` (a name of KERNELS, or auto) stands for.

    ``auto`` prefers a library's kernel that can, then one of ours that was validated, then the plain forms. Raises
    InputError for an unknown name, and for a kernel that lacks what is wanted.
    """
    objections = {name: entry.objection(wanted) for name, entry in KERNELS.items()}
    able = [name for name, objection in objections.items() if objection is None]
    if kernel == "auto":
        plain = ("reference", "chunked") if wanted.length <= REFERENCE_LENGTH else ("chunked", "reference")
        order = (*PREFERRED.get(wanted.hardware.platform, ()), *plain)
        name = next(name for name in order if name in able and _is_validated(name, wanted))
        entry = KERNELS[name]
        why = [f"{entry.summary}, for {wanted.length} positions on {wanted.hardware}"]
        why += [] if entry.validation is None else [entry.validation]
        unproved = "was not validated on this hardware for such heads (lmjax info --validate-kernels)"
        why += [f"{other} {objections[other] or unproved}" for other in order[: order.index(name)]]
        return Choice(name, "; ".join(why))
    if kernel not in KERNELS:
        raise InputError(f"attention kernel {kernel!r} is not known; choose one of {', '.join(['auto', *able])}")
    if objections[kernel] is not None:
        raise InputError(
            f"attention kernel {kernel!r} {objections[kernel]}; those that can do this are {', '.join(['auto', *able])}"
        )
    return Choice(kernel, "named in the configuration")


def _is_validated(name: str, wanted: Wanted) -> bool:
    heads = wanted.dtype, wanted.head_dim, wanted.value_dim
    return KERNELS[name].is_validated or is_recorded(name, wanted.hardware, *heads)
