"""Attention: one function in front of several kernels, which ``attention_kernels`` has in a table.

Legend: B batch, T positions, N query heads, K kv heads, H head_dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from lmjax.errors import InputError
from lmjax.hardware import Hardware, hardware_here
from lmjax.mesh import BATCH_AXES
from lmjax.ops.attention_kernels import KERNELS, Wanted, choose_kernel, wanted_features
from lmjax.ops.attention_mask import Mask


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
    visits: Any = None,
    scale: float,
    softcap: float | None = None,
    kernel: str = "auto",
    hardware: Hardware | None = None,
    save_as: str | None = None,
) -> Float[Array, "batch T heads value_dim"]:
    """softmax(scores) v under ``mask``, within each segment, in the dtype of q; the softmax is in float32.

    Scores are scale q k^T, capped by ``softcap``, less ``slopes`` (of ALiBi) times the distance; ``sinks`` are scores
    that take part in the softmax and have no value. Keys where ``prefix`` is true are seen by all of their segment.
    Segments follow each other without coming back, and a prefix is the beginning of its segment; where that is not so
    and the arrays are known it is an error, and in a program the rows concerned give NaN with kernels that visit tiles.

    Rows are split over the batch axes and query heads over ``tensor``, and so are kv heads; those that ``tensor`` does
    not divide are given whole to every device (as ``lmjax.sharding.activation_spec`` says), which takes its own.
    ``segment_ids`` are 0 at padding, whose result is 0. ``visits`` is what ``attention_visits`` gave for these rows and
    kernel; without it the kernel finds out itself. ``hardware`` is that of the devices here unless it is given, as
    a compile for absent devices must. ``save_as`` is the name by which a ``jax.checkpoint`` policy can keep the result
    together with whatever else spares the backward pass another run of the kernel. Raises InputError for a kernel that
    cannot do this.
    """
    T, N, H = q_BTNH.shape[1:]
    K = k_BTKH.shape[2]
    _check_shapes(q_BTNH, k_BTKH, v_BTKH)
    _check_order(segment_ids, prefix)
    hardware = hardware_here() if hardware is None else hardware
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
    wanted = Wanted(
        features=features,
        hardware=hardware,
        length=T,
        head_dim=H,
        value_dim=v_BTKH.shape[3],
        dtype=str(q_BTNH.dtype),
    )
    entry = KERNELS[choose_kernel(kernel, wanted).name]
    options = entry.options_on(hardware)
    if softcap is not None:
        options["softcap"] = softcap
    attend = functools.partial(entry.attend, mask=mask, scale=scale, save_as=save_as, **options)
    num_shards = jax.sharding.get_abstract_mesh().shape["tensor"]
    heads_split = K % num_shards == 0

    extras = {"prefix_BT": prefix, "slopes_N": slopes, "sinks_N": sinks}
    extra_specs = {name: P(BATCH_AXES, None) if name == "prefix_BT" else P("tensor") for name in extras}
    extras = {name: jax.sharding.reshard(x, extra_specs[name]) for name, x in extras.items() if x is not None}
    if visits is not None:
        extras["visits"], extra_specs["visits"] = visits, P(BATCH_AXES)

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


def attention_visits(
    wanted: Wanted,
    mask: Mask,
    segment_ids: Int[Array, "batch T"] | None,
    prefix: Bool[Array, "batch T"] | None,
    kernel: str = "auto",
) -> Any:
    """What the kernel of ``wanted`` finds out of the rows, once for every attention with this mask.

    None where the kernel finds out nothing, or all rows are alike. Rows are split over the batch axes.
    """
    entry = KERNELS[choose_kernel(kernel, wanted).name]
    if entry.visits is None or (segment_ids is None and prefix is None):
        return None
    dims = max(wanted.head_dim, wanted.value_dim)
    make = functools.partial(entry.visits, mask=mask, dims=dims, **entry.options_on(wanted.hardware))
    row_spec = P(BATCH_AXES, None)
    in_specs = tuple(None if x is None else row_spec for x in (segment_ids, prefix))
    return jax.shard_map(make, in_specs=in_specs, out_specs=P(BATCH_AXES), check_vma=False)(segment_ids, prefix)


def _check_shapes(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> None:
    if q_BTNH.shape[1] != k_BTKH.shape[1] or k_BTKH.shape[:3] != v_BTKH.shape[:3]:
        raise InputError(
            f"attention: queries, keys and values are {q_BTNH.shape}, {k_BTKH.shape} and {v_BTKH.shape}; rows have to "
            "be as long in all three, and keys and values to have as many heads"
        )
    if q_BTNH.shape[2] % k_BTKH.shape[2]:
        raise InputError(
            f"attention: {q_BTNH.shape[2]} query heads do not divide into groups for {k_BTKH.shape[2]} kv heads"
        )


def _check_order(segment_ids: jax.Array | None, prefix: jax.Array | None) -> None:
    """Raises InputError where segments come back or a prefix is not a beginning, if the arrays are known."""
    given = [x for x in (segment_ids, prefix) if x is not None]
    if not given or any(isinstance(x, Tracer) for x in given):
        return
    ids_BT = np.ones(given[0].shape, np.int32) if segment_ids is None else np.asarray(segment_ids)
    is_start_BT = ids_BT[:, 1:] != ids_BT[:, :-1]
    largest_before_BT = np.maximum.accumulate(ids_BT, axis=1)[:, :-1]
    is_wrong_BT = is_start_BT & (ids_BT[:, 1:] != 0) & (ids_BT[:, 1:] <= largest_before_BT)
    if prefix is not None:
        prefix_BT = np.asarray(prefix)
        is_wrong_BT |= prefix_BT[:, 1:] & ~is_start_BT & ~prefix_BT[:, :-1]
    for row, position in np.argwhere(is_wrong_BT):
        raise InputError(
            f"attention: at position {position + 1} of row {row} a segment's id comes back after another one's, or a "
            "prefix begins inside its segment; number the segments of a row in their order, with 0 for padding"
        )


def _own_kv_heads(x_BTKH: jax.Array, num_local: int, group: int) -> jax.Array:
    """Of all kv heads, those of this device's ``num_local`` query heads; ``group`` query heads share one."""
    first = jax.lax.axis_index("tensor") * num_local
    if group % num_local == 0:
        return jax.lax.dynamic_slice_in_dim(x_BTKH, first // group, 1, axis=2)
    return jnp.take(x_BTKH, (first + jnp.arange(num_local)) // group, axis=2)
