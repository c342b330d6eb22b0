"""The bodies of the Hopper kernels: what the three warpgroups of a program do for one tile.

One warpgroup loads tiles into rings in shared memory, and two compute, each for 64 positions of the program's own tile;
where a head is so long that its accumulators do not fit the registers, both compute for the same 64 and divide the
dimensions of the head. Tiles are visited from the first to the last that is visible (``attention_tiles``), masked only
where not all of their pairs are.

Legend: T queries of a tile, S keys of a tile, H head_dim, V that of values, B batch, N query heads, K kv heads.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lmjax.compat import load_registers, transposed_ref
from lmjax.ops.attention_flash import HIDDEN, LOG2_E, NOTHING, Options

COMPUTING = 2
"""Warpgroups that compute; one more loads."""

ROWS = 64
"""Positions of a warpgroup's own tile: the rows of one wgmma."""

WGMMA = plgpu.Layout.WGMMA
Accumulator: Any = plgpu.WGMMAAccumulatorRef


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The shapes of one kernel."""

    batch: int
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


def _smem(*shape: int, dtype: Any) -> Any:
    """Matrices in the layout that the tensor cores read."""
    row_bytes = shape[-1] * jnp.dtype(dtype).itemsize
    swizzle = next(size for size in (128, 64, 32) if row_bytes % size == 0)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


class Head:
    """The vectors of a head in shared memory: (..., split, positions, dims / split)."""

    @staticmethod
    def scratch(sizes: Sizes, *leading: int, positions: int, dims: int) -> Any:
        return _smem(*leading, sizes.split, positions, dims // sizes.split, dtype=sizes.dtype)

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


def _products(
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


def _accumulate(
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


def _staging(options: Options, sizes: Sizes) -> list[Any]:
    return [_smem(COMPUTING, ROWS, sizes.visited, dtype=sizes.dtype)] if options.interpret else []


def _constant(value: Any, shape: tuple[int, ...], layout: Any = WGMMA) -> jax.Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _along(x: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """``x``, which goes along ``axis`` of ``shape``, in all of it."""
    return lax.broadcast_in_dim(x, shape, [axis])


def _scores(options: Options, product, factor, slope, visible, *, query_axis: int, distance: Any):
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
        first, end = (_along(x, shape, query_axis) for x in visible)
        scores = jnp.where((first <= key) & (key < end), scores, HIDDEN)
    return scores, tanh


def _weights(scores, tanh, dweights, lse, delta) -> tuple[jax.Array, jax.Array]:
    """The softmax, and the gradient of scale x q k^T."""
    weights = jnp.exp2(scores - lse)
    dproducts = weights * (dweights - delta)
    return weights, dproducts if tanh is None else dproducts * (1.0 - tanh * tanh)


def _visit(ranges: list[jax.Array], visit: Callable[..., Any], carry: Any) -> Any:
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


def _slot(sizes: Sizes, step: Any) -> Any:
    return lax.rem(step, jnp.int32(sizes.stages))


def _fill(sizes: Sizes, count: Any, *rings: tuple[Callable[[Any, Any], None], Any]) -> None:
    """Load ``count`` steps into each ring, ``load(step, slot)``, as soon as what was in the slot is consumed."""
    for step in range(sizes.stages):

        @pl.when(step < count)
        def _(step=step):
            for load, _ in rings:
                load(jnp.int32(step), step)

    @pl.loop(0, count - sizes.stages)
    def _(step):
        slot = _slot(sizes, step)
        for load, consumed in rings:
            plgpu.barrier_wait(consumed.at[slot])
            load(step + sizes.stages, slot)


def _roles(*, load: Callable[[], None], compute: Callable[[Any], None]) -> None:
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


def _wait_for_all(barrier) -> None:
    """Go on when both computing warpgroups are here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


class Own(NamedTuple):
    """Where a program is: its row, the head that it reads, the number of its tile and the first position of that."""

    row: Any
    head: Any
    tile: Any
    position: Any

    @classmethod
    def here(cls, sizes: Sizes) -> "Own":
        tile = sizes.num_own - 1 - lax.axis_index("tile")  # under a causal mask queries' longest first
        return cls(lax.axis_index("row"), lax.axis_index("head"), tile, tile * sizes.own)

    def ranges(self, ranges_ref) -> list[jax.Array]:
        return [ranges_ref[self.row, self.tile, i] for i in range(4)]

    def of_set(self, number: Any) -> Any:
        """The positions of one set of warpgroups that compute for the same."""
        return pl.ds(self.position + number * ROWS, ROWS)


def forward_scratch(options: Options, sizes: Sizes) -> list[Any]:
    shared = functools.partial(Head.scratch, sizes)
    sets, stages = sizes.sets, sizes.stages
    return [
        shared(sets, positions=ROWS, dims=sizes.key_dim),
        shared(stages, positions=sizes.visited, dims=sizes.key_dim),
        shared(stages, positions=sizes.visited, dims=sizes.value_dim),
        plgpu.SMEM((sets, 2, ROWS), jnp.int32),
        plgpu.SMEM((sets, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=2 * sets),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages),
        plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages),
        plgpu.Barrier(num_arrivals=COMPUTING),
        *([] if sizes.key_dim == sizes.value_dim else [shared(sets, positions=ROWS, dims=sizes.value_dim)]),
        *_staging(options, sizes),
    ]


def forward_kernel(options: Options, sizes: Sizes, *refs) -> None:
    q_ref, k_ref, v_ref, visible_ref, ranges_ref, factors_ref, slopes_ref, sinks_ref, out_ref, lse_ref = refs[:10]
    q_smem, k_smem, v_smem, visible_smem, lse_smem, own_ready = refs[10:16]
    k_ready, v_ready, k_consumed, v_consumed, turn, *staging = refs[16:]
    out_smem = q_smem if sizes.key_dim == sizes.value_dim else staging.pop(0)
    own = Own.here(sizes)
    ranges = own.ranges(ranges_ref)
    first, end = ranges[:2]

    def load():
        for each in range(sizes.sets):
            here = own.of_set(each)
            Head.load(sizes, q_ref.at[own.row, here, own.head], q_smem.at[each], own_ready)
            plgpu.copy_gmem_to_smem(visible_ref.at[own.row, :, here], visible_smem.at[each], own_ready)
        kv_head = lax.div(own.head, jnp.int32(sizes.group))

        def load_from(source_ref, smem, ready):
            def load_step(step, slot):
                there = pl.ds((first + step) * sizes.visited, sizes.visited)
                Head.load(sizes, source_ref.at[own.row, there, kv_head], smem.at[slot], ready.at[slot])

            return load_step

        _fill(
            sizes,
            end - first,
            (load_from(k_ref, k_smem, k_ready), k_consumed),
            (load_from(v_ref, v_smem, v_ready), v_consumed),
        )

    def compute(warpgroup):
        query = own.position + warpgroup * ROWS
        plgpu.barrier_wait(own_ready)
        per_query = functools.partial(load_registers, layout=WGMMA.reduce(1))
        first_T, end_T = per_query(visible_smem.at[warpgroup, 0]), per_query(visible_smem.at[warpgroup, 1])
        factor, slope = factors_ref[own.row], slopes_ref[own.head]
        # A sink is a key that was seen already, and has no value.
        max_T = _constant(sinks_ref[own.head] * LOG2_E if options.has_sinks else NOTHING, (ROWS,), WGMMA.reduce(1))
        sum_T = _constant(1.0 if options.has_sinks else 0.0, (ROWS,), WGMMA.reduce(1))

        def visit(tile, carry, *, masked):
            acc_TV, max_T, sum_T = carry
            slot, key = _slot(sizes, tile - first), tile * sizes.visited
            plgpu.barrier_wait(k_ready.at[slot])
            shape = (ROWS, sizes.visited)
            # While one warpgroup multiplies, the other one is at its softmax.
            before = functools.partial(_wait_for_all, turn)
            (product_TS,) = _products(shape, (q_smem.at[warpgroup], k_smem.at[slot]), meanwhile=before)
            plgpu.barrier_arrive(k_consumed.at[slot])
            visible = (first_T - key, end_T - key) if masked else None
            scores_TS, _ = _scores(options, product_TS, factor, slope, visible, query_axis=0, distance=query - key)
            new_max_T = jnp.maximum(max_T, scores_TS.max(axis=1))
            shrink_T = jnp.exp2(max_T - new_max_T)
            weights_TS = jnp.exp2(scores_TS - _along(new_max_T, shape, 0))
            sum_T = sum_T * shrink_T + weights_TS.sum(axis=1)
            acc_TV *= _along(shrink_T, acc_TV.shape, 0)
            rounded_TS = weights_TS.astype(sizes.dtype)
            acc_TV, new_max_T, sum_T, rounded_TS = lax.optimization_barrier((acc_TV, new_max_T, sum_T, rounded_TS))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_ready.at[slot])
            plgpu.barrier_wait(turn)
            (acc_TV,) = _accumulate(options, staging, 0, (acc_TV, rounded_TS, v_smem.at[slot]))
            plgpu.barrier_arrive(v_consumed.at[slot])
            return acc_TV, new_max_T, sum_T

        pl.when(warpgroup == 1)(lambda: _wait_for_all(turn))
        carry = _constant(0.0, (ROWS, sizes.value_dim)), max_T, sum_T
        acc_TV, max_T, sum_T = _visit(ranges, visit, carry)
        pl.when(warpgroup == 0)(lambda: _wait_for_all(turn))

        sees_T = sum_T > 0
        total_T = jnp.where(sees_T, sum_T, 1.0)
        out_smem[warpgroup, 0] = (acc_TV * _along(1.0 / total_T, acc_TV.shape, 0)).astype(sizes.dtype)
        # So large where nothing is seen that all weights of the backward pass are 0.
        lse_smem[warpgroup] = jnp.where(sees_T, max_T + jnp.log(total_T) * LOG2_E, -HIDDEN)
        plgpu.commit_smem()
        here = own.of_set(warpgroup)
        plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, 0], out_ref.at[own.row, here, own.head])
        plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[own.row, own.head, here])
        plgpu.wait_smem_to_gmem(0)

    _roles(load=load, compute=compute)


def dq_scratch(options: Options, sizes: Sizes) -> list[Any]:
    shared = functools.partial(Head.scratch, sizes)
    sets, stages = sizes.sets, sizes.stages
    return [
        shared(sets, positions=ROWS, dims=sizes.key_dim),
        shared(sets, positions=ROWS, dims=sizes.value_dim),
        shared(stages, positions=sizes.visited, dims=sizes.key_dim),
        shared(stages, positions=sizes.visited, dims=sizes.value_dim),
        plgpu.SMEM((sets, 2, ROWS), jnp.int32),
        plgpu.SMEM((sets, 2, ROWS), jnp.float32),
        plgpu.Barrier(num_arrivals=(2 * sizes.split + 2) * sets),
        plgpu.Barrier(num_arrivals=2 * sizes.split, num_barriers=stages),
        plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages),
        plgpu.Barrier(num_arrivals=COMPUTING),
        *_staging(options, sizes),
    ]


def dq_kernel(options: Options, sizes: Sizes, *refs) -> None:
    q_ref, k_ref, v_ref, dout_ref, visible_ref, stats_ref, ranges_ref, factors_ref, slopes_ref, dq_ref = refs[:10]
    q_smem, dout_smem, k_smem, v_smem, visible_smem, stats_smem, own_ready, ready, consumed, all_done = refs[10:20]
    staging = refs[20:]
    own = Own.here(sizes)
    ranges = own.ranges(ranges_ref)
    first, end = ranges[:2]

    def load():
        for each in range(sizes.sets):
            here = own.of_set(each)
            Head.load(sizes, q_ref.at[own.row, here, own.head], q_smem.at[each], own_ready)
            Head.load(sizes, dout_ref.at[own.row, here, own.head], dout_smem.at[each], own_ready)
            plgpu.copy_gmem_to_smem(visible_ref.at[own.row, :, here], visible_smem.at[each], own_ready)
            plgpu.copy_gmem_to_smem(stats_ref.at[own.row, own.head, :, here], stats_smem.at[each], own_ready)
        kv_head = lax.div(own.head, jnp.int32(sizes.group))

        def load_step(step, slot):
            there = pl.ds((first + step) * sizes.visited, sizes.visited)
            Head.load(sizes, k_ref.at[own.row, there, kv_head], k_smem.at[slot], ready.at[slot])
            Head.load(sizes, v_ref.at[own.row, there, kv_head], v_smem.at[slot], ready.at[slot])

        _fill(sizes, end - first, (load_step, consumed))

    def compute(warpgroup):
        each, part = sizes.set_and_part(warpgroup)
        query, shape = own.position + each * ROWS, (ROWS, sizes.visited)
        plgpu.barrier_wait(own_ready)
        per_query = functools.partial(load_registers, layout=WGMMA.reduce(1))
        first_T, end_T = per_query(visible_smem.at[each, 0]), per_query(visible_smem.at[each, 1])
        lse_T, delta_T = per_query(stats_smem.at[each, 0]), per_query(stats_smem.at[each, 1])
        factor, slope = factors_ref[own.row], slopes_ref[own.head]

        def visit(tile, acc_TH, *, masked):
            slot, key = _slot(sizes, tile - first), tile * sizes.visited
            plgpu.barrier_wait(ready.at[slot])
            product_TS, dweights_TS = _products(
                shape, (q_smem.at[each], k_smem.at[slot]), (dout_smem.at[each], v_smem.at[slot])
            )
            visible = (first_T - key, end_T - key) if masked else None
            scores = _scores(options, product_TS, factor, slope, visible, query_axis=0, distance=query - key)
            lse_TS, delta_TS = _along(lse_T, shape, 0), _along(delta_T, shape, 0)
            _, dproducts_TS = _weights(*scores, dweights_TS, lse_TS, delta_TS)
            term = acc_TH, dproducts_TS.astype(sizes.dtype), k_smem.at[slot]
            (acc_TH,) = _accumulate(options, staging, part, term)
            plgpu.barrier_arrive(consumed.at[slot])
            return acc_TH

        acc_TH = _visit(ranges, visit, _constant(0.0, (ROWS, sizes.key_dim // sizes.split)))
        _wait_for_all(all_done)  # nobody reads q any more
        q_smem[each, part] = (acc_TH * options.scale).astype(sizes.dtype)
        plgpu.commit_smem()
        Head.store(q_smem.at[each], dq_ref.at[own.row, own.of_set(each), own.head], part)

    _roles(load=load, compute=compute)


def dkv_scratch(options: Options, sizes: Sizes) -> list[Any]:
    shared = functools.partial(Head.scratch, sizes)
    sets, stages, T = sizes.sets, sizes.stages, sizes.visited
    return [
        shared(sets, positions=ROWS, dims=sizes.key_dim),
        shared(sets, positions=ROWS, dims=sizes.value_dim),
        shared(stages, positions=T, dims=sizes.key_dim),
        shared(stages, positions=T, dims=sizes.value_dim),
        plgpu.SMEM((stages, 2, T), jnp.int32),
        plgpu.SMEM((stages, 2, T), jnp.float32),
        plgpu.Barrier(num_arrivals=2 * sizes.split * sets),
        plgpu.Barrier(num_arrivals=2 * sizes.split + 2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=stages),
        plgpu.Barrier(num_arrivals=COMPUTING),
        *_staging(options, sizes),
    ]


def dkv_kernel(options: Options, sizes: Sizes, *refs) -> None:
    q_ref, k_ref, v_ref, dout_ref, visible_ref, stats_ref, ranges_ref, factors_ref, slopes_ref = refs[:9]
    dk_ref, dv_ref, k_smem, v_smem, q_smem, dout_smem, visible_smem, stats_smem, own_ready = refs[9:18]
    ready, consumed, all_done, *staging = refs[18:]
    own = Own.here(sizes)
    ranges = own.ranges(ranges_ref)
    first, end = ranges[:2]
    count, first_head = end - first, own.head * sizes.group

    def load():
        for each in range(sizes.sets):
            here = own.of_set(each)
            Head.load(sizes, k_ref.at[own.row, here, own.head], k_smem.at[each], own_ready)
            Head.load(sizes, v_ref.at[own.row, here, own.head], v_smem.at[each], own_ready)

        def load_step(step, slot):
            head = first_head + lax.div(step, count)
            there = pl.ds((first + lax.rem(step, count)) * sizes.visited, sizes.visited)
            Head.load(sizes, q_ref.at[own.row, there, head], q_smem.at[slot], ready.at[slot])
            Head.load(sizes, dout_ref.at[own.row, there, head], dout_smem.at[slot], ready.at[slot])
            plgpu.copy_gmem_to_smem(visible_ref.at[own.row, :, there], visible_smem.at[slot], ready.at[slot])
            plgpu.copy_gmem_to_smem(stats_ref.at[own.row, head, :, there], stats_smem.at[slot], ready.at[slot])

        _fill(sizes, count * sizes.group, (load_step, consumed))

    def compute(warpgroup):
        each, part = sizes.set_and_part(warpgroup)
        key, shape = own.position + each * ROWS, (ROWS, sizes.visited)
        plgpu.barrier_wait(own_ready)
        per_query = functools.partial(load_registers, layout=WGMMA.reduce(0))
        factor = factors_ref[own.row]

        def visit_head(number, carry):
            slope = slopes_ref[first_head + number]

            def visit(tile, carry, *, masked):
                dk_SH, dv_SV = carry
                slot = _slot(sizes, number * count + tile - first)
                plgpu.barrier_wait(ready.at[slot])
                product_ST, dweights_ST = _products(
                    shape, (k_smem.at[each], q_smem.at[slot]), (v_smem.at[each], dout_smem.at[slot])
                )
                visible = None
                if masked:
                    visible = [per_query(visible_smem.at[slot, i]) - key for i in range(2)]
                distance = tile * sizes.visited - key
                scores = _scores(options, product_ST, factor, slope, visible, query_axis=1, distance=distance)
                lse_ST, delta_ST = (_along(per_query(stats_smem.at[slot, i]), shape, 1) for i in range(2))
                weights_ST, dproducts_ST = _weights(*scores, dweights_ST, lse_ST, delta_ST)
                dv_SV, dk_SH = _accumulate(
                    options,
                    staging,
                    part,
                    (dv_SV, weights_ST.astype(sizes.dtype), dout_smem.at[slot]),
                    (dk_SH, dproducts_ST.astype(sizes.dtype), q_smem.at[slot]),
                )
                plgpu.barrier_arrive(consumed.at[slot])
                return dk_SH, dv_SV

            return _visit(ranges, visit, carry)

        zeros = [_constant(0.0, (ROWS, dims // sizes.split)) for dims in (sizes.key_dim, sizes.value_dim)]
        dk_SH, dv_SV = lax.fori_loop(0, sizes.group, visit_head, tuple(zeros))
        _wait_for_all(all_done)  # nobody reads k and v any more
        k_smem[each, part] = (dk_SH * options.scale).astype(sizes.dtype)
        v_smem[each, part] = dv_SV.astype(sizes.dtype)
        plgpu.commit_smem()
        here = own.of_set(each)
        Head.store(k_smem.at[each], dk_ref.at[own.row, here, own.head], part)
        Head.store(v_smem.at[each], dv_ref.at[own.row, here, own.head], part)

    _roles(load=load, compute=compute)
