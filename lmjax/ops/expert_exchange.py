"""Rows to the devices of their experts and back: a ragged all-to-all over the mesh axis ``expert``.

Every device has rows sorted by expert. It sends each expert's rows, one slice of them, to the place that they have
there among those of all devices: by expert, then by sender.

Legend: P devices along ``expert``, E experts, L of them on a device, M rows, S slices, D embed.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmjax.ops.grouped_matmul import varying_together

EMULATED_ON = frozenset({"cpu"})
"""Platforms whose compiler has no ragged all-to-all: each device gathers all rows there, and takes its own."""


class Slices(NamedTuple):
    """The slices that a device sends, as many to each device: those of the first, then those of the second, …"""

    start: Int[Array, " slices"]
    """Where each begins here."""
    size: Int[Array, " slices"]
    target: Int[Array, " slices"]
    """Where each begins where it is sent."""
    received: Int[Array, " slices"]
    """The sizes of those that come here, by sender."""


class Exchange(NamedTuple):
    """What goes where, on one device."""

    forth: Slices
    back: Slices
    sizes: Int[Array, " local_experts"]
    """Rows that come here, for each expert."""


def plan_exchange(sizes_E: Int[Array, " experts"]) -> Exchange:
    """The exchange of rows that are sorted by expert, ``sizes`` of them for each; called by all devices together."""
    sizes_PE = jax.lax.all_gather(sizes_E, "expert")
    num_devices = sizes_PE.shape[0]
    sizes_PPL = sizes_PE.reshape(num_devices, num_devices, -1)  # of each sender, for each receiver's experts
    start_PPL = _before(sizes_PE, axis=1).reshape(sizes_PPL.shape)
    here_PL = jnp.sum(sizes_PPL, axis=0)
    target_PPL = _before(here_PL, axis=1) + _before(sizes_PPL, axis=0)
    device = jax.lax.axis_index("expert")
    sent, received = sizes_PPL[device].reshape(-1), sizes_PPL[:, device].reshape(-1)
    start, target = start_PPL[device].reshape(-1), target_PPL[device].reshape(-1)
    their_start, their_target = start_PPL[:, device].reshape(-1), target_PPL[:, device].reshape(-1)
    return Exchange(
        forth=Slices(start, sent, target, received),
        back=Slices(their_target, received, their_start, sent),
        sizes=here_PL[device],
    )


def sent_to_experts(
    rows_MD: Float[Array, "rows embed"], exchange: Exchange, num_rows: int, platform: str
) -> Float[Array, "received embed"]:
    """``num_rows`` rows, of which the first ones are those that came here, sorted by expert; the others are zeros."""
    return _moved(len(rows_MD), num_rows, platform, rows_MD, exchange.forth, exchange.back)


def sent_back(
    rows_MD: Float[Array, "received embed"], exchange: Exchange, num_rows: int, platform: str
) -> Float[Array, "rows embed"]:
    """What became of the rows that this device had sent, ``num_rows`` of them, in their places."""
    return _moved(len(rows_MD), num_rows, platform, rows_MD, exchange.back, exchange.forth)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _moved(num_before: int, num_after: int, platform: str, rows_MD, there: Slices, back: Slices) -> jax.Array:
    zeros, rows_MD = varying_together(jnp.zeros((num_after, rows_MD.shape[1]), rows_MD.dtype), rows_MD)
    if platform in EMULATED_ON:
        return _emulated(rows_MD, zeros, there)
    return jax.lax.ragged_all_to_all(rows_MD, zeros, *there, axis_name="expert")


def _moved_forward(num_before, num_after, platform, rows_MD, there, back):
    return _moved(num_before, num_after, platform, rows_MD, there, back), (there, back)


def _moved_backward(num_before, num_after, platform, slices, d_rows_MD):
    there, back = slices
    return _moved(num_after, num_before, platform, d_rows_MD, back, there), None, None


_moved.defvjp(_moved_forward, _moved_backward)


def _emulated(rows_MD: jax.Array, output_MD: jax.Array, slices: Slices) -> jax.Array:
    """What ``jax.lax.ragged_all_to_all`` gives for slices that do not overlap where they are sent."""
    num_rows = len(rows_MD)
    device, num_devices = jax.lax.axis_index("expert"), jax.lax.axis_size("expert")
    all_MD = jax.lax.all_gather(rows_MD, "expert", tiled=True)

    def coming(sent_S: jax.Array) -> jax.Array:
        """Of every sender, what it says of its slices for this device."""
        return jax.lax.all_gather(sent_S, "expert").reshape(num_devices, num_devices, -1)[:, device]

    senders = jnp.arange(num_devices)[:, None]
    start_S, size_S, target_S = (coming(part) for part in (slices.start, slices.size, slices.target))
    start_S = (start_S + senders * num_rows).reshape(-1)
    size_S, target_S = size_S.reshape(-1), target_S.reshape(-1)
    order_S = jnp.lexsort((size_S > 0, target_S))  # an empty slice may begin where another one does: it comes first
    start_S, size_S, target_S = start_S[order_S], size_S[order_S], target_S[order_S]
    places = jnp.arange(len(output_MD))
    slice_M = jnp.maximum(jnp.searchsorted(target_S, places, side="right") - 1, 0)
    offset_M = places - target_S[slice_M]
    is_sent_M = (offset_M >= 0) & (offset_M < size_S[slice_M])
    taken_MD = all_MD[jnp.where(is_sent_M, start_S[slice_M] + offset_M, 0)]
    return jnp.where(is_sent_M[:, None], taken_MD, output_MD)


def _before(sizes: jax.Array, axis: int) -> jax.Array:
    """The sum of what comes before each along the axis."""
    return jnp.cumsum(sizes, axis=axis) - sizes
