"""What the Hopper kernels are made of: sizes, loads into rings, products on the tensor cores, scores.

One warpgroup loads tiles into rings in shared memory, and two compute, each for 64 positions of the program's own tile;
where a head is so long that its accumulators do not fit the registers, both compute for the same 64 and divide the
dimensions of the head.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lmjax.compat import transposed_ref
from lmjax.ops.attention_flash import HIDDEN, LOG2_E, Options

COMPUTING = 2
"""Warpgroups that compute; one more loads."""

ROWS = 64
"""Positions of a warpgroup's own tile: the rows of one wgmma."""

WGMMA = plgpu.Layout.WGMMA
Accumulator: Any = plgpu.WGMMAAccumulatorRef


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The shapes of one kernel."""

    length: int
    """A multiple of ``own`` and ``visited``."""
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: Any
    visited: int
    """Positions of the tiles that a program visits."""
    stages: int
    """Visited tiles that shared memory holds."""
    split: int = 1
    """Warpgroups that compute for the same positions, each for its part of a head's dimensions."""

    @property
    def sets(self) -> int:
        """Of warpgroups that compute for the same positions."""
        return COMPUTING // self.split

    @property
    def own(self) -> int:
        """Positions of a program's own tile."""
        return ROWS * self.sets

    def set_and_part(self, warpgroup: Any) -> tuple[Any, Any]:
        """Whose positions a warpgroup computes for, and which part of their dimensions is its own."""
        if self.split == 1:
            return warpgroup, 0
        split = jnp.int32(self.split)
        return lax.div(warpgroup, split), lax.rem(warpgroup, split)

    @property
    def num_own(self) -> int:
        return self.length // self.own

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.heads // self.kv_heads


def matrices(*shape: int, dtype: Any) -> Any:
    """Matrices in the layout that the tensor cores read."""
    row_bytes = shape[-1] * jnp.dtype(dtype).itemsize
    swizzle = next(size for size in (128, 64, 32) if row_bytes % size == 0)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


class Head:
    """The vectors of a head in shared memory: (..., split, positions, dims / split)."""

    @staticmethod
    def scratch(sizes: Sizes, *leading: int, positions: int, dims: int) -> Any:
        return matrices(*leading, sizes.split, positions, dims // sizes.split, dtype=sizes.dtype)

    @staticmethod
    def load(sizes: Sizes, source_ref, smem_ref, barrier) -> None:
        """From (positions, dims): ``split`` arrivals at the barrier."""
        dims = smem_ref.shape[-1]
        for part in range(sizes.split):
            plgpu.copy_gmem_to_smem(source_ref.at[:, pl.ds(part * dims, dims)], smem_ref.at[part], barrier)

    @staticmethod
    def store(smem_ref, target_ref, part: Any) -> None:
        """One part to its dimensions of (positions, dims)."""
        dims = smem_ref.shape[-1]
        plgpu.copy_smem_to_gmem(smem_ref.at[part], target_ref.at[:, pl.ds(part * dims, dims)])
        plgpu.wait_smem_to_gmem(0)


def products(
    shape: tuple[int, int], *operands: tuple[Any, Any], meanwhile: Callable[[], None] = lambda: None
) -> tuple[jax.Array, ...]:
    """(rows, columns) of float32 for every pair of heads in shared memory: a b^T over all dimensions."""

    def run(*acc_refs):
        for acc_ref, (a, b) in zip(acc_refs, operands, strict=True):
            for part in range(a.shape[0]):
                plgpu.wgmma(acc_ref, a.at[part], transposed_ref(b.at[part]))
        meanwhile()
        return tuple(acc_ref[...] for acc_ref in acc_refs)

    return pl.run_scoped(run, *[Accumulator(shape, jnp.float32) for _ in operands])


def accumulate(
    options: Options, staging: Sequence[Any], part: Any, *terms: tuple[jax.Array, jax.Array, Any]
) -> list[jax.Array]:
    """acc + a b for every (acc, a, b), a in registers and b that part of a head in shared memory."""
    if options.interpret:
        staging_ref = staging[0].at[lax.axis_index("warpgroup")]
        return [_accumulate_staged(staging_ref, acc, a, b.at[part]) for acc, a, b in terms]

    def run(acc_refs):
        for acc_ref, (_, a, b) in zip(acc_refs, terms, strict=True):
            plgpu.wgmma(acc_ref, a, b.at[part])

    results: Any = pl.run_state(run)(tuple(Accumulator.init(acc) for acc, _, _ in terms))
    return list(results)


def _accumulate_staged(staging_ref, acc: jax.Array, a: jax.Array, b) -> jax.Array:
    """The same for Pallas's interpreter, which has operands and results of wgmma in memory alone."""
    staging_ref[...] = a
    plgpu.commit_smem()

    def run(acc_ref):
        plgpu.wgmma(acc_ref, staging_ref, b)
        return acc_ref[...]

    return acc + pl.run_scoped(run, Accumulator(acc.shape, jnp.float32))


def staging_scratch(options: Options, sizes: Sizes) -> list[Any]:
    return [matrices(COMPUTING, ROWS, sizes.visited, dtype=sizes.dtype)] if options.interpret else []


def constant(value: Any, shape: tuple[int, ...], layout: Any = WGMMA) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def along(x: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """``x``, which goes along ``axis`` of ``shape``, in all of it."""
    return lax.broadcast_in_dim(x, shape, [axis])


def scores_of(options: Options, product, factor, slope, visible, *, query_axis: int, distance: Any):
    """The logarithms to base 2 of what keys weigh; and the tanh of a softcap.

    ``visible`` are the keys that each query sees, less the first key, or None where it sees all. ``distance`` is that
    from the first key to the first query.
    """
    shape = product.shape
    scores, tanh = product * factor, None
    if options.softcap is not None:
        # The GPU's own tanh is good to 5e-4 only, which a cap of 50 makes 0.02 in a score.
        tanh = 1.0 - 2.0 / (1.0 + jnp.exp2(scores * (2 * LOG2_E)))
        scores = tanh * (options.softcap * LOG2_E)
    query, key = (plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA) for axis in (query_axis, 1 - query_axis))
    if options.has_slopes:
        apart = (query - key + distance).astype(jnp.float32)
        scores -= jnp.maximum(apart, -apart) * (slope * LOG2_E)
    if visible is not None:
        first, end = (along(x, shape, query_axis) for x in visible)
        scores = jnp.where((first <= key) & (key < end), scores, HIDDEN)
    return scores, tanh


def weights_of(scores, tanh, dweights, lse, delta) -> tuple[jax.Array, jax.Array]:
    """The softmax, and the gradient of scale x q k^T."""
    weights = jnp.exp2(scores - lse)
    dproducts = weights * (dweights - delta)
    return weights, dproducts if tanh is None else dproducts * (1.0 - tanh * tanh)


def visit_tiles(ranges: list[jax.Array], visit: Callable[..., Any], carry: Any) -> Any:
    """Carry through ``visit(tile, carry, masked=)``, which needs no mask in the range that the last two numbers are."""
    first, end, unmasked_first, unmasked_end = ranges
    unmasked_first = jnp.minimum(jnp.maximum(unmasked_first, first), end)
    unmasked_end = jnp.minimum(jnp.maximum(unmasked_end, unmasked_first), end)
    for begin, stop, masked in (
        (first, unmasked_first, True),
        (unmasked_first, unmasked_end, False),
        (unmasked_end, end, True),
    ):
        carry = lax.fori_loop(begin, stop, lambda tile, carry, masked=masked: visit(tile, carry, masked=masked), carry)
    return carry


def slot_of(sizes: Sizes, step: Any) -> Any:
    return lax.rem(step, jnp.int32(sizes.stages))


def fill(sizes: Sizes, count: Any, *rings: tuple[Callable[[Any, Any], None], Any]) -> None:
    """Load ``count`` steps into each ring, ``load(step, slot)``, as soon as what was in the slot is consumed."""
    for step in range(sizes.stages):

        @pl.when(step < count)
        def _(step=step):
            for load, _ in rings:
                load(jnp.int32(step), step)

    @pl.loop(0, count - sizes.stages)
    def _(step):
        slot = slot_of(sizes, step)
        for load, consumed in rings:
            plgpu.barrier_wait(consumed.at[slot])
            load(step + sizes.stages, slot)


def roles(*, load: Callable[[], None], compute: Callable[[Any], None]) -> None:
    """``compute(warpgroup)`` in those that compute, ``load()`` in the other, with registers where they are needed."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < COMPUTING)
    def _():
        plgpu.set_max_registers(232, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == COMPUTING)
    def _():
        plgpu.set_max_registers(40, action="decrease")
        load()


def wait_for_all(barrier) -> None:
    """Go on when both computing warpgroups are here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)
