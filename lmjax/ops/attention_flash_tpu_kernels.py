"""The bodies of the TPU kernels: what is done at one step, for a pair of tiles.

Legend: T queries of a tile, S keys of a tile, H head_dim, V that of values, B batch, W steps.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from lmjax.ops.attention_flash import HIDDEN, LOG2_E, NOTHING, Options
from lmjax.ops.attention_tiles import FIRST, FLAG_BITS, LAST, MASKED, Schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class TPUOptions(Options):
    """What is known while compiling."""

    tile: int
    """Positions of a tile."""
    part: int
    """Keys whose scores the forward pass makes at once: the fewer, the less of them leaves the registers."""


class Work(NamedTuple):
    """The shapes of a call, and what it visits."""

    batch: int
    length: int
    padded: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    tile: int
    step_heads: int
    """Query heads of a step, all of one kv head."""
    by_query: "Steps"
    by_key: "Steps"
    first_B1T: jax.Array
    end_B1T: jax.Array
    is_exact_B: jax.Array

    @property
    def parts(self) -> int:
        """Steps that the query heads of a kv head are divided into."""
        return self.heads // self.kv_heads // self.step_heads


class Steps(NamedTuple):
    """A schedule in scalar memory, two numbers a step: of 1 MiB it leaves room."""

    num_steps: Any
    tiles_W: Any
    rows_and_flags_W: Any

    @classmethod
    def of(cls, visits: Schedule) -> "Steps":
        tiles_W, rows_and_flags_W = visits.tile_W << 16 | visits.other_W, visits.row_W << FLAG_BITS | visits.flags_W
        return cls(visits.num_steps, jnp.asarray(tiles_W), jnp.asarray(rows_and_flags_W))

    def row(self, step: Any) -> Any:
        return self.rows_and_flags_W[step] >> FLAG_BITS

    def flags(self, step: Any) -> Any:
        return self.rows_and_flags_W[step] & ((1 << FLAG_BITS) - 1)

    def tile(self, step: Any) -> Any:
        return self.tiles_W[step] >> 16

    def other(self, step: Any) -> Any:
        return self.tiles_W[step] & 0xFFFF


class Tile(NamedTuple):
    """A pair of tiles in a kernel."""

    options: Options
    query: Any
    """The position of the first query."""
    key: Any
    """The position of the first key."""
    first_1T: Any
    end_1T: Any
    factor: Any
    """Of the row."""

    def scores(self, k_SH, q_TH, slope, *, masked: bool) -> tuple[jax.Array, jax.Array | None]:
        """(S, T): the logarithms to base 2 of what keys weigh; and the tanh of a softcap."""
        scores_ST = _dot(k_SH, q_TH, (1, 1)) * self.factor
        tanh_ST = None
        if self.options.softcap is not None:
            tanh_ST = jnp.tanh(scores_ST)
            scores_ST = tanh_ST * (self.options.softcap * LOG2_E)
        query_ST, key_ST = (jax.lax.broadcasted_iota(jnp.int32, scores_ST.shape, axis) for axis in (1, 0))
        if self.options.has_slopes:
            distance_ST = jnp.abs(query_ST - key_ST + (self.query - self.key)).astype(jnp.float32)
            scores_ST -= distance_ST * (slope * LOG2_E)
        if masked:
            first_1T, end_1T = self.first_1T[...] - self.key, self.end_1T[...] - self.key
            scores_ST = jnp.where((first_1T <= key_ST) & (key_ST < end_1T), scores_ST, HIDDEN)
        return scores_ST, tanh_ST


def _dot(x, y, contracting: tuple[int, int]) -> jax.Array:
    """The product of two matrices over one dimension of each, accumulated in float32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dimensions = (((contracting[0],), (contracting[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _visit(steps: Steps, visit: Callable[[bool], None], *, begin, finish, part: Any = 0, parts: int = 1) -> None:
    """What a step does: ``visit`` with or without a mask, after ``begin`` and before ``finish`` as its flags say."""
    flags = steps.flags(pl.program_id(1))
    is_masked = (flags & MASKED) != 0
    pl.when(((flags & FIRST) != 0) & (part == 0))(begin)
    pl.when(is_masked)(lambda: visit(True))
    pl.when(~is_masked)(lambda: visit(False))
    pl.when(((flags & LAST) != 0) & (part == parts - 1))(finish)


def forward_kernel(options: TPUOptions, work: Work, *refs):
    steps = Steps(None, *refs[:2])
    sinks_ref, factors_ref, slopes_ref, first_ref, end_ref, q_ref, k_ref, v_ref, out_ref, lse_ref = refs[2:12]
    max_ref, sum_ref, acc_ref = refs[12:]
    step, head = pl.program_id(1), pl.program_id(0) * work.step_heads
    query, key = steps.tile(step) * work.tile, steps.other(step) * work.tile
    tile = Tile(options, query, key, first_ref, end_ref, factors_ref[steps.row(step)])

    def begin():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        for each in range(work.step_heads):
            if options.has_sinks:  # a sink is a key that was seen already, and has no value
                max_ref[each] = jnp.full(max_ref.shape[1:], sinks_ref[head + each] * LOG2_E)
                sum_ref[each] = jnp.ones(sum_ref.shape[1:], jnp.float32)
            else:
                max_ref[each] = jnp.full(max_ref.shape[1:], NOTHING)
                sum_ref[each] = jnp.zeros(sum_ref.shape[1:], jnp.float32)

    # A product of one part is made while the softmax of another is.
    part_keys = math.gcd(work.tile, options.part)
    parts = [(each, start) for each in range(work.step_heads) for start in range(0, work.tile, part_keys)]

    def visit(masked):
        def scores_of(each, start):
            keys = slice(start, start + part_keys)
            part = tile._replace(key=tile.key + start)
            return part.scores(k_ref[keys], q_ref[each], slopes_ref[head + each], masked=masked)[0], v_ref[keys]

        following = scores_of(*parts[0])
        for (each, _), next_part in zip(parts, [*parts[1:], None], strict=True):
            scores_ST, v_SV = following
            if next_part is not None:
                following = scores_of(*next_part)
            old_max_1T = max_ref[each]
            max_1T = jnp.maximum(old_max_1T, scores_ST.max(0, keepdims=True))
            exp_ST = jnp.exp2(scores_ST - max_1T)
            shrink_1T = jnp.exp2(old_max_1T - max_1T)
            max_ref[each] = max_1T
            sum_ref[each] = shrink_1T * sum_ref[each] + exp_ST.sum(0, keepdims=True)
            acc_ref[each] = shrink_1T * acc_ref[each] + _dot(v_SV, exp_ST.astype(v_ref.dtype), (0, 0))

    def finish():
        for each in range(work.step_heads):
            sees_1T = sum_ref[each] > 0
            sum_1T = jnp.where(sees_1T, sum_ref[each], 1.0)
            out_ref[each] = (acc_ref[each] / sum_1T).T.astype(out_ref.dtype)
            # So large where nothing is seen that all weights of the backward pass are 0.
            lse_ref[each] = jnp.where(sees_1T, max_ref[each] + jnp.log2(sum_1T), -HIDDEN)

    _visit(steps, visit, begin=begin, finish=finish)


def dq_kernel(options: Options, work: Work, *refs):
    steps = Steps(None, *refs[:2])
    factors_ref, slopes_ref, first_ref, end_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref = refs[2:12]
    dq_ref, acc_ref = refs[12:]
    step, head = pl.program_id(1), pl.program_id(0) * work.step_heads
    query, key = steps.tile(step) * work.tile, steps.other(step) * work.tile
    tile = Tile(options, query, key, first_ref, end_ref, factors_ref[steps.row(step)])

    def begin():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def visit(masked):
        for each in range(work.step_heads):
            scores = tile.scores(k_ref[...], q_ref[each], slopes_ref[head + each], masked=masked)
            _, dproducts_ST = _weights(*scores, v_ref[...], dout_ref[each], lse_ref[each], delta_ref[each])
            acc_ref[each] += _dot(k_ref[...], dproducts_ST.astype(k_ref.dtype), (0, 0))

    def finish():
        for each in range(work.step_heads):
            dq_ref[each] = (acc_ref[each] * options.scale).T.astype(dq_ref.dtype)

    _visit(steps, visit, begin=begin, finish=finish)


def dkv_kernel(options: Options, work: Work, *refs):
    steps = Steps(None, *refs[:2])
    factors_ref, slopes_ref, first_ref, end_ref, q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref = refs[2:12]
    dk_ref, dv_ref, dk_acc_ref, dv_acc_ref = refs[12:]
    step, part = pl.program_id(1), pl.program_id(2)
    head = (pl.program_id(0) * work.parts + part) * work.step_heads
    query, key = steps.other(step) * work.tile, steps.tile(step) * work.tile
    tile = Tile(options, query, key, first_ref, end_ref, factors_ref[steps.row(step)])

    def begin():
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    def visit(masked):
        for each in range(work.step_heads):
            scores = tile.scores(k_ref[...], q_ref[each], slopes_ref[head + each], masked=masked)
            weights_ST, dproducts_ST = _weights(*scores, v_ref[...], dout_ref[each], lse_ref[each], delta_ref[each])
            dv_acc_ref[...] += _dot(weights_ST.astype(dout_ref.dtype), dout_ref[each], (1, 0))
            dk_acc_ref[...] += _dot(dproducts_ST.astype(q_ref.dtype), q_ref[each], (1, 0))

    def finish():
        dk_ref[...] = (dk_acc_ref[...] * options.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)

    _visit(steps, visit, begin=begin, finish=finish, part=part, parts=work.parts)


def _weights(scores_ST, tanh_ST, v_SV, dout_TV, lse_1T, delta_1T) -> tuple[jax.Array, jax.Array]:
    """(S, T): the softmax, and the gradient of scale x q k^T."""
    weights_ST = jnp.exp2(scores_ST - lse_1T)
    dproducts_ST = weights_ST * (_dot(v_SV, dout_TV, (1, 1)) - delta_1T)
    if tanh_ST is not None:
        dproducts_ST *= 1 - tanh_ST * tanh_ST
    return weights_ST, dproducts_ST
