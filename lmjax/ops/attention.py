"""Attention: one function in front of several kernels, and the table that says which of them can do what.

Legend: B batch, T positions, N query heads, K kv heads, H head_dim.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from lmjax.errors import InputError
from lmjax.mesh import BATCH_AXES
from lmjax.ops.attention_chunked import chunked_attention
from lmjax.ops.attention_mask import Mask
from lmjax.ops.attention_reference import reference_attention
from lmjax.ops.attention_splash import LANES, splash_attention

REFERENCE_LENGTH = 1024
"""Up to this many positions ``auto`` prefers all scores of a row at once to blocks of them: memory bears it."""

PLATFORMS = frozenset({"cpu", "gpu", "tpu"})
FEATURES = frozenset({"causal", "bidirectional", "window", "segments", "prefix", "softcap", "alibi", "sinks"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """What a kernel is and can do."""

    attend: Callable[..., jax.Array]
    """Attention of one device's rows and heads; the signature of ``reference_attention``."""
    summary: str
    """What speaks for it."""
    features: frozenset[str]
    """Those of FEATURES that it has."""
    platforms: frozenset[str]
    """Those of PLATFORMS where it runs."""
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Further keyword arguments of ``attend`` on a platform."""
    length_multiple: int = 1
    """What the length of a row has to be a multiple of."""


KERNELS: dict[str, Kernel] = {
    "reference": Kernel(
        attend=reference_attention,
        summary="all scores of a row at once",
        features=FEATURES,
        platforms=PLATFORMS,
        options={"cpu": {"block": 64}},  # what is computed with stays in the cache, and half of it is left out
    ),
    "chunked": Kernel(
        attend=chunked_attention,
        summary="blocks of scores, memory linear in the length",
        features=FEATURES,
        platforms=PLATFORMS,
        options={"cpu": {"block": 64}},
    ),
    "splash": Kernel(
        attend=splash_attention,
        summary="JAX's block-sparse kernel for TPU",
        features=FEATURES - {"prefix", "alibi", "sinks"},
        platforms=frozenset({"tpu"}),
        length_multiple=LANES,
    ),
}


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


def choose_kernel(kernel: str, *, features: frozenset[str], platform: str, length: int) -> Choice:
    """The kernel that ``kernel`` (a name of KERNELS, or auto) stands for, for rows of ``length`` positions.

    Raises InputError for an unknown name, and for a kernel that lacks what is asked for.
    """
    assert platform in PLATFORMS, platform
    objections = {name: _objection(entry, features, platform, length) for name, entry in KERNELS.items()}
    able = [name for name, objection in objections.items() if objection is None]
    if kernel == "auto":
        plain = ("reference", "chunked") if length <= REFERENCE_LENGTH else ("chunked", "reference")
        order = ("splash", *plain)
        name = next(name for name in order if name in able)
        why = f"{KERNELS[name].summary}, for {length} positions on {platform}"
        passed_over = [f"{other} {objections[other]}" for other in order[: order.index(name)]]
        return Choice(name, "; ".join([why, *passed_over]))
    if kernel not in KERNELS:
        raise InputError(f"attention kernel {kernel!r} is not known; choose one of {', '.join(['auto', *able])}")
    if objections[kernel] is not None:
        raise InputError(
            f"attention kernel {kernel!r} {objections[kernel]}; those that can do this are {', '.join(['auto', *able])}"
        )
    return Choice(kernel, "named in the configuration")


def _objection(entry: Kernel, wanted: frozenset[str], platform: str, length: int) -> str | None:
    if missing := wanted - entry.features:
        return f"does not have {', '.join(sorted(missing))}"
    if platform not in entry.platforms:
        return f"runs on {', '.join(sorted(entry.platforms))} only, not on {platform}"
    if length % entry.length_multiple:
        return f"takes rows of a multiple of {entry.length_multiple} positions, not {length}"
    return None


def attention(
    q_BTNH: Float[Array, "batch T heads head_dim"],
    k_BTKH: Float[Array, "batch T kv_heads head_dim"],
    v_BTKH: Float[Array, "batch T kv_heads value_dim"],
    *,
    mask: Mask,
    segment_ids: Int[Array, "batch T"] | None,
    prefix: Bool[Array, "batch T"] | None = None,
    slopes: Float[Array, " heads"] | None = None,
    sinks: Float[Array, " heads"] | None = None,
    scale: float,
    softcap: float | None = None,
    kernel: str = "auto",
    platform: str | None = None,
    save_as: str | None = None,
) -> Float[Array, "batch T heads value_dim"]:
    """softmax(scores) v under ``mask``, within each segment, in the dtype of q; the softmax is in float32.

    Scores are scale q k^T, capped by ``softcap``, less ``slopes`` (of ALiBi) times the distance; ``sinks`` are scores
    that take part in the softmax and have no value. Keys where ``prefix`` is true are seen by all of their segment.

    Rows are split over the batch axes and query heads over ``tensor``, and so are kv heads; those that ``tensor`` does
    not divide are given whole to every device (as ``lmjax.sharding.activation_spec`` says), which takes its own.
    ``segment_ids`` are 0 at padding, whose result is 0. ``platform`` (cpu, gpu or tpu) is that of the devices here
    unless it is given, as a compile for absent devices must. ``save_as`` is the name by which a ``jax.checkpoint``
    policy can keep the result together with whatever else spares the backward pass another run of the kernel. Raises
    InputError for a kernel that cannot do this.
    """
    T, N = q_BTNH.shape[1:3]
    K = k_BTKH.shape[2]
    platform = jax.default_backend() if platform is None else platform
    features = wanted_features(
        mask,
        segments=segment_ids is not None,
        prefix=prefix is not None,
        softcap=softcap is not None,
        alibi=slopes is not None,
        sinks=sinks is not None,
    )
    if "prefix" in features and not (mask.causal and mask.window is None):
        raise InputError("attention: a prefix goes with a causal mask without a window; leave out one of them")
    choice = choose_kernel(kernel, features=features, platform=platform, length=T)
    entry = KERNELS[choice.name]
    options = dict(entry.options.get(platform, {}))
    if softcap is not None:
        options["softcap"] = softcap
    attend = functools.partial(entry.attend, mask=mask, scale=scale, save_as=save_as, **options)
    num_shards = jax.sharding.get_abstract_mesh().shape["tensor"]
    heads_split = K % num_shards == 0

    extras = {"prefix_BT": prefix, "slopes_N": slopes, "sinks_N": sinks}
    extra_specs = {name: P(BATCH_AXES, None) if name == "prefix_BT" else P("tensor") for name in extras}
    extras = {name: jax.sharding.reshard(x, extra_specs[name]) for name, x in extras.items() if x is not None}

    def local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, extras):
        if not heads_split:
            k_BTKH, v_BTKH = (_own_kv_heads(x, q_BTNH.shape[2], N // K) for x in (k_BTKH, v_BTKH))
        return attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, **extras)

    q_spec = P(BATCH_AXES, None, "tensor", None)
    kv_spec = q_spec if heads_split else P(BATCH_AXES, None, None, None)
    segment_spec = None if segment_ids is None else P(BATCH_AXES, None)
    # Pallas kernels do not say over which axes their results vary, so nothing inside may rely on that being checked.
    return jax.shard_map(
        local,
        in_specs=(q_spec, kv_spec, kv_spec, segment_spec, {name: extra_specs[name] for name in extras}),
        out_specs=q_spec,
        check_vma=False,
    )(q_BTNH, k_BTKH, v_BTKH, segment_ids, extras)


def _own_kv_heads(x_BTKH: jax.Array, num_local: int, group: int) -> jax.Array:
    """Of all kv heads, those of this device's ``num_local`` query heads; ``group`` query heads share one."""
    first = jax.lax.axis_index("tensor") * num_local
    if group % num_local == 0:
        return jax.lax.dynamic_slice_in_dim(x_BTKH, first // group, 1, axis=2)
    return jnp.take(x_BTKH, (first + jnp.arange(num_local)) // group, axis=2)
