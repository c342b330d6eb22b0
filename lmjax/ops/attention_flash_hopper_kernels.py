"""The bodies of the Hopper kernels: what the three warpgroups of a program do for one tile.

Tiles are visited from the first to the last of which anything is visible (``attention_tiles``), masked only where not
all of their pairs are.

Legend: T queries of a tile, S keys of a tile, H head_dim, V that of values, B batch, N query heads, K kv heads.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lmjax.compat import load_registers
from lmjax.ops.attention_flash import HIDDEN, LOG2_E, NOTHING, Options
from lmjax.ops.attention_flash_hopper_parts import (
    COMPUTING,
    ROWS,
    WGMMA,
    Head,
    Sizes,
    accumulate,
    along,
    constant,
    fill,
    products,
    roles,
    scores_of,
    slot_of,
    staging_scratch,
    visit_tiles,
    wait_for_all,
    weights_of,
)


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
        *staging_scratch(options, sizes),
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

        fill(
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
        max_T = constant(sinks_ref[own.head] * LOG2_E if options.has_sinks else NOTHING, (ROWS,), WGMMA.reduce(1))
        sum_T = constant(1.0 if options.has_sinks else 0.0, (ROWS,), WGMMA.reduce(1))

        def visit(tile, carry, *, masked):
            acc_TV, max_T, sum_T = carry
            slot, key = slot_of(sizes, tile - first), tile * sizes.visited
            plgpu.barrier_wait(k_ready.at[slot])
            shape = (ROWS, sizes.visited)
            # While one warpgroup multiplies, the other one is at its softmax.
            before = functools.partial(wait_for_all, turn)
            (product_TS,) = products(shape, (q_smem.at[warpgroup], k_smem.at[slot]), meanwhile=before)
            plgpu.barrier_arrive(k_consumed.at[slot])
            visible = (first_T - key, end_T - key) if masked else None
            scores_TS, _ = scores_of(options, product_TS, factor, slope, visible, query_axis=0, distance=query - key)
            new_max_T = jnp.maximum(max_T, scores_TS.max(axis=1))
            shrink_T = jnp.exp2(max_T - new_max_T)
            weights_TS = jnp.exp2(scores_TS - along(new_max_T, shape, 0))
            sum_T = sum_T * shrink_T + weights_TS.sum(axis=1)
            acc_TV *= along(shrink_T, acc_TV.shape, 0)
            rounded_TS = weights_TS.astype(sizes.dtype)
            acc_TV, new_max_T, sum_T, rounded_TS = lax.optimization_barrier((acc_TV, new_max_T, sum_T, rounded_TS))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_ready.at[slot])
            plgpu.barrier_wait(turn)
            (acc_TV,) = accumulate(options, staging, 0, (acc_TV, rounded_TS, v_smem.at[slot]))
            plgpu.barrier_arrive(v_consumed.at[slot])
            return acc_TV, new_max_T, sum_T

        pl.when(warpgroup == 1)(lambda: wait_for_all(turn))
        carry = constant(0.0, (ROWS, sizes.value_dim)), max_T, sum_T
        acc_TV, max_T, sum_T = visit_tiles(ranges, visit, carry)
        pl.when(warpgroup == 0)(lambda: wait_for_all(turn))

        sees_T = sum_T > 0
        total_T = jnp.where(sees_T, sum_T, 1.0)
        out_smem[warpgroup, 0] = (acc_TV * along(1.0 / total_T, acc_TV.shape, 0)).astype(sizes.dtype)
        # So large where nothing is seen that all weights of the backward pass are 0.
        lse_smem[warpgroup] = jnp.where(sees_T, max_T + jnp.log(total_T) * LOG2_E, -HIDDEN)
        plgpu.commit_smem()
        here = own.of_set(warpgroup)
        plgpu.copy_smem_to_gmem(out_smem.at[warpgroup, 0], out_ref.at[own.row, here, own.head])
        plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[own.row, own.head, here])
        plgpu.wait_smem_to_gmem(0)

    roles(load=load, compute=compute)


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
        *staging_scratch(options, sizes),
    ]


def dq_kernel(options: Options, sizes: Sizes, *refs) -> None:
    q_ref, k_ref, v_ref, visible_ref, ranges_ref, factors_ref, slopes_ref, dout_ref, stats_ref, dq_ref = refs[:10]
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

        fill(sizes, end - first, (load_step, consumed))

    def compute(warpgroup):
        each, part = sizes.set_and_part(warpgroup)
        query, shape = own.position + each * ROWS, (ROWS, sizes.visited)
        plgpu.barrier_wait(own_ready)
        per_query = functools.partial(load_registers, layout=WGMMA.reduce(1))
        first_T, end_T = per_query(visible_smem.at[each, 0]), per_query(visible_smem.at[each, 1])
        lse_T, delta_T = per_query(stats_smem.at[each, 0]), per_query(stats_smem.at[each, 1])
        factor, slope = factors_ref[own.row], slopes_ref[own.head]

        def visit(tile, acc_TH, *, masked):
            slot, key = slot_of(sizes, tile - first), tile * sizes.visited
            plgpu.barrier_wait(ready.at[slot])
            product_TS, dweights_TS = products(
                shape, (q_smem.at[each], k_smem.at[slot]), (dout_smem.at[each], v_smem.at[slot])
            )
            visible = (first_T - key, end_T - key) if masked else None
            scores = scores_of(options, product_TS, factor, slope, visible, query_axis=0, distance=query - key)
            lse_TS, delta_TS = along(lse_T, shape, 0), along(delta_T, shape, 0)
            _, dproducts_TS = weights_of(*scores, dweights_TS, lse_TS, delta_TS)
            term = acc_TH, dproducts_TS.astype(sizes.dtype), k_smem.at[slot]
            (acc_TH,) = accumulate(options, staging, part, term)
            plgpu.barrier_arrive(consumed.at[slot])
            return acc_TH

        acc_TH = visit_tiles(ranges, visit, constant(0.0, (ROWS, sizes.key_dim // sizes.split)))
        wait_for_all(all_done)  # nobody reads q any more
        q_smem[each, part] = (acc_TH * options.scale).astype(sizes.dtype)
        plgpu.commit_smem()
        Head.store(q_smem.at[each], dq_ref.at[own.row, own.of_set(each), own.head], part)

    roles(load=load, compute=compute)


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
        *staging_scratch(options, sizes),
    ]


def dkv_kernel(options: Options, sizes: Sizes, *refs) -> None:
    q_ref, k_ref, v_ref, visible_ref, ranges_ref, factors_ref, slopes_ref, dout_ref, stats_ref = refs[:9]
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

        fill(sizes, count * sizes.group, (load_step, consumed))

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
                slot = slot_of(sizes, number * count + tile - first)
                plgpu.barrier_wait(ready.at[slot])
                product_ST, dweights_ST = products(
                    shape, (k_smem.at[each], q_smem.at[slot]), (v_smem.at[each], dout_smem.at[slot])
                )
                visible = None
                if masked:
                    visible = [per_query(visible_smem.at[slot, i]) - key for i in range(2)]
                distance = tile * sizes.visited - key
                scores = scores_of(options, product_ST, factor, slope, visible, query_axis=1, distance=distance)
                lse_ST, delta_ST = (along(per_query(stats_smem.at[slot, i]), shape, 1) for i in range(2))
                weights_ST, dproducts_ST = weights_of(*scores, dweights_ST, lse_ST, delta_ST)
                dv_SV, dk_SH = accumulate(
                    options,
                    staging,
                    part,
                    (dv_SV, weights_ST.astype(sizes.dtype), dout_smem.at[slot]),
                    (dk_SH, dproducts_ST.astype(sizes.dtype), q_smem.at[slot]),
                )
                plgpu.barrier_arrive(consumed.at[slot])
                return dk_SH, dv_SV

            return visit_tiles(ranges, visit, carry)

        zeros = [constant(0.0, (ROWS, dims // sizes.split)) for dims in (sizes.key_dim, sizes.value_dim)]
        dk_SH, dv_SV = lax.fori_loop(0, sizes.group, visit_head, tuple(zeros))
        wait_for_all(all_done)  # nobody reads k and v any more
        k_smem[each, part] = (dk_SH * options.scale).astype(sizes.dtype)
        v_smem[each, part] = dv_SV.astype(sizes.dtype)
        plgpu.commit_smem()
        here = own.of_set(each)
        Head.store(k_smem.at[each], dk_ref.at[own.row, here, own.head], part)
        Head.store(v_smem.at[each], dv_ref.at[own.row, here, own.head], part)

    roles(load=load, compute=compute)
