"""Flash attention for TPU with every feature: Pallas kernels that visit only the tiles of which something is visible.

FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2), with scores in powers of two. All scores are held with keys in
rows and queries in columns: what belongs to a query (its maximum, its sum, the keys it sees) is a row of its own, that
goes with every row of scores. The pairs of tiles to visit are the steps of the grid (``attention_tiles``), so that
loads and products overlap from one pair to the next, whatever the mask is.

Legend: B batch, T query positions, S key positions, N query heads, K kv heads, H head_dim, V that of values, W steps.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from lmjax.ops.attention_flash import LOG2_E
from lmjax.ops.attention_flash_tpu_kernels import (
    Steps,
    TPUOptions,
    Work,
    dkv_kernel,
    dq_kernel,
    forward_kernel,
)
from lmjax.ops.attention_flash_tpu_tiles import Tiling, tiling_of
from lmjax.ops.attention_mask import Mask
from lmjax.ops.attention_tiles import (
    VisibleKeys,
    most_steps,
    schedule,
    tile_length,
    tile_ranges,
    visible_keys,
)

LANES = 128
"""Positions that one vector register of a TPU holds; tiles are multiples of it."""


MAX_STEPS = 120_000
"""Steps of a schedule that scalar memory (1 MiB on every generation) holds, at most."""

HEADS = 4
"""Query heads of one step, at most."""

HEADS_BYTES = 512
"""Of one position's query, where a step has several heads: larger ones do not fit the 16 MiB of vector memory that
kernels get."""


class Visits(NamedTuple):
    """What the kernels visit. A call of theirs takes some of the rows: a part, of which everything here is stacked."""

    by_query: Steps
    by_key: Steps
    first_B1T: Any
    end_B1T: Any
    """Of each query the keys that it sees; see ``VisibleKeys``."""
    is_exact_B: Any


def flash_attention_tpu(
    q_BTNH: Float[Array, "batch T heads head_dim"],
    k_BTKH: Float[Array, "batch T kv_heads head_dim"],
    v_BTKV: Float[Array, "batch T kv_heads value_dim"],
    segment_ids_BT: Int[Array, "batch T"] | None,
    prefix_BT: Bool[Array, "batch T"] | None = None,
    slopes_N: Float[Array, " heads"] | None = None,
    sinks_N: Float[Array, " heads"] | None = None,
    visits: Visits | None = None,
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    save_as: str | None = None,
    generation: str = "v5p",
    tiling: Tiling | None = None,
    interpret: Any = False,
) -> Float[Array, "batch T heads value_dim"]:
    """What ``reference_attention`` gives. Of the forward pass the result and a logarithm for each query are kept.

    Rows whose segment ids come back after others, and those whose prefix is not the beginning of its segment, give NaN.
    ``visits`` are those of ``flash_visits`` for the same rows, mask and tiles, where they were made before. Tiles are
    ``tiling``, or what suits the TPUs of ``generation``. ``interpret`` runs the kernels' programs on any platform,
    slowly: true, or parameters of Pallas's TPU interpreter.
    """
    B, T, _, H = q_BTNH.shape
    has_prefix = prefix_BT is not None
    tiling = tiling or tiling_of(generation, max(H, v_BTKV.shape[3]))
    options = TPUOptions(
        mask=mask,
        scale=scale,
        softcap=softcap,
        has_slopes=slopes_N is not None,
        has_sinks=sinks_N is not None,
        save_as=save_as,
        tile=_tile(mask, T, tiling, has_prefix=has_prefix),
        part=tiling.part,
        interpret=interpret,
    )
    if visits is None and not (segment_ids_BT is None and prefix_BT is None):
        visits = flash_visits(segment_ids_BT, prefix_BT, mask=mask, dims=H, tiling=tiling)
    num_parts = B // _rows_of_a_call(mask, B, T, options.tile, has_prefix=has_prefix)
    parts = [x.reshape(num_parts, -1, *x.shape[1:]) for x in (q_BTNH, k_BTKH, v_BTKV)]

    def of_part(part):
        return _attention(options, *part, slopes_N, sinks_N)

    if num_parts == 1:
        return of_part(jax.tree.map(lambda x: x[0], (*parts, visits)))
    out: Any = jax.lax.map(of_part, (*parts, visits))
    return out.reshape(B, *out.shape[2:])


def flash_visits(
    segment_ids_BT: Int[Array, "batch T"] | None,
    prefix_BT: Bool[Array, "batch T"] | None,
    *,
    mask: Mask,
    dims: int,
    generation: str = "v5p",
    tiling: Tiling | None = None,
    interpret: Any = False,
) -> Visits:
    """What rows with segments or prefixes make the kernels visit: the same in every layer with this mask.

    The arguments by name are those of the attention that it is for, whose longest keys or values are of ``dims``.
    """
    del interpret
    given: Any = segment_ids_BT if prefix_BT is None else prefix_BT
    B, T = given.shape
    has_prefix = prefix_BT is not None
    tile = _tile(mask, T, tiling or tiling_of(generation, dims), has_prefix=has_prefix)
    rows = _rows_of_a_call(mask, B, T, tile, has_prefix=has_prefix)
    visible = visible_keys(mask, T, segment_ids_BT, prefix_BT)
    of_parts = jax.tree.map(lambda x: x.reshape(B // rows, rows, *x.shape[1:]), visible)
    return jax.vmap(lambda part: _visits(part, mask, tile, has_prefix=has_prefix))(of_parts)


def _tile(mask: Mask, length: int, tiling: Tiling, *, has_prefix: bool) -> int:
    """Positions of a tile: more than the tiling says where scalar memory would not hold the steps of one row."""
    tile = tile_length(length, tiling.tile, LANES)
    while max(most_steps(mask, length, tile, tile, has_prefix=has_prefix)) > MAX_STEPS:
        tile = tile_length(length, 2 * tile, LANES)
    return tile


def _rows_of_a_call(mask: Mask, batch: int, length: int, tile: int, *, has_prefix: bool) -> int:
    """All rows where scalar memory holds the steps of all; otherwise 1."""
    steps = max(most_steps(mask, length, tile, tile, has_prefix=has_prefix))
    return batch if batch * steps <= MAX_STEPS else 1


def _visits(visible: VisibleKeys, mask: Mask, tile: int, *, has_prefix: bool) -> Visits:
    """Of one part."""
    rows, length = visible.first_BT.shape
    num_tiles = -(-length // tile)
    most = most_steps(mask, length, tile, tile, has_prefix=has_prefix)
    by_query, by_key = (
        Steps.of(schedule(ranges, num_tiles, rows * steps))
        for ranges, steps in zip(tile_ranges(visible, tile, tile), most, strict=True)
    )
    padding = ((0, 0), (0, num_tiles * tile - length))
    first_B1T, end_B1T = (jnp.pad(jnp.asarray(x), padding)[:, None] for x in visible[:2])
    return Visits(by_query, by_key, first_B1T, end_B1T, jnp.asarray(visible.is_exact_B))


def _work(options: TPUOptions, q_BTNH, v_BTKV, visits: Visits | None) -> Work:
    (B, T, N, H), (K, V) = q_BTNH.shape, v_BTKV.shape[2:]
    if visits is None:  # of NumPy, so that the grid's size is known while compiling
        visible = visible_keys(options.mask, T)
        visible = VisibleKeys(*(np.broadcast_to(x, (B, *x.shape[1:])) for x in visible))
        visits = _visits(visible, options.mask, options.tile, has_prefix=False)
    most_heads = HEADS if max(H, V) * q_BTNH.dtype.itemsize <= HEADS_BYTES else 1
    return Work(
        batch=B,
        length=T,
        padded=visits.first_B1T.shape[-1],
        heads=N,
        kv_heads=K,
        key_dim=H,
        value_dim=V,
        tile=options.tile,
        step_heads=max(size for size in range(1, most_heads + 1) if (N // K) % size == 0),
        by_query=visits.by_query,
        by_key=visits.by_key,
        first_B1T=visits.first_B1T,
        end_B1T=visits.end_B1T,
        is_exact_B=visits.is_exact_B,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: TPUOptions, *inputs):
    return _forward(options, *inputs)[0]


def _forward(options: TPUOptions, q_BTNH, k_BTKH, v_BTKV, visits, slopes_N, sinks_N):
    work = _work(options, q_BTNH, v_BTKV, visits)
    rows = work.step_heads, 1, work.tile
    out_BNTV, lse_BN1T = _call(
        forward_kernel,
        options,
        work,
        work.by_query,
        {
            "sinks": _scalars(work, sinks_N),
            **_shared_inputs(options, work, q_BTNH, k_BTKH, v_BTKV, slopes_N),
        },
        outputs={
            "out": ((work.batch, work.heads, work.padded, work.value_dim), v_BTKV.dtype),
            "lse": ((work.batch, work.heads, 1, work.padded), jnp.dtype("float32")),
        },
        scratch=[rows, rows, (work.step_heads, work.value_dim, work.tile)],
        dims=work.key_dim + work.value_dim,
    )
    out_BTNV = jnp.swapaxes(out_BNTV, 1, 2)[:, : work.length].astype(q_BTNH.dtype)
    if options.save_as is not None:
        out_BTNV, lse_BN1T = (checkpoint_name(x, options.save_as) for x in (out_BTNV, lse_BN1T))
    return out_BTNV, (q_BTNH, k_BTKH, v_BTKV, visits, slopes_N, sinks_N, out_BTNV, lse_BN1T)


def _backward(options: TPUOptions, residuals, dout_BTNV):
    q_BTNH, k_BTKH, v_BTKV, visits, slopes_N, sinks_N, out_BTNV, lse_BN1T = residuals
    work = _work(options, q_BTNH, v_BTKV, visits)
    delta_BTN = jnp.einsum("btnv,btnv->btn", out_BTNV, dout_BTNV, preferred_element_type=jnp.float32)
    delta_BNT = _heads_first(work, delta_BTN)
    inputs = {
        **_shared_inputs(options, work, q_BTNH, k_BTKH, v_BTKV, slopes_N),
        "dout": _heads_first(work, dout_BTNV.astype(v_BTKV.dtype)),
        "lse": lse_BN1T,
        "delta": delta_BNT[:, :, None],
    }
    (dq_BNTH,) = _call(
        dq_kernel,
        options,
        work,
        work.by_query,
        inputs,
        outputs={"dq": (inputs["q"].shape, q_BTNH.dtype)},
        scratch=[(work.step_heads, work.key_dim, work.tile)],
        dims=2 * work.key_dim + work.value_dim,
    )
    dk_BKTH, dv_BKTV = _call(
        dkv_kernel,
        options,
        work,
        work.by_key,
        inputs,
        outputs={"dk": (inputs["k"].shape, k_BTKH.dtype), "dv": (inputs["v"].shape, v_BTKV.dtype)},
        scratch=[(work.tile, work.key_dim), (work.tile, work.value_dim)],
        dims=2 * (work.key_dim + work.value_dim),
    )
    dq, dk, dv = (jnp.swapaxes(x, 1, 2)[:, : work.length] for x in (dq_BNTH, dk_BKTH, dv_BKTV))
    dsinks_N = None
    if sinks_N is not None:
        weights_BNT = jnp.exp2(sinks_N.astype(jnp.float32)[:, None] * LOG2_E - lse_BN1T[:, :, 0])
        dsinks_N = -jnp.einsum("bnt,bnt->n", weights_BNT, delta_BNT).astype(sinks_N.dtype)
    return dq, dk, dv, None, None, dsinks_N


_attention.defvjp(_forward, _backward)


def _heads_first(work: Work, x_BTN: jax.Array) -> jax.Array:
    """(batch, positions, heads, ...) to (batch, heads, padded positions, ...)."""
    x_BTN = jnp.pad(x_BTN, ((0, 0), (0, work.padded - work.length)) + ((0, 0),) * (x_BTN.ndim - 2))
    return jnp.swapaxes(x_BTN, 1, 2)


def _shared_inputs(options: TPUOptions, work: Work, q_BTNH, k_BTKH, v_BTKV, slopes_N) -> dict[str, jax.Array]:
    """What all kernels take."""
    q_BNTH, k_BKTH, v_BKTV = (_heads_first(work, x) for x in (q_BTNH, k_BTKH, v_BTKV))
    return {
        "factors": jnp.where(work.is_exact_B, options.factor, jnp.nan).astype(jnp.float32),
        "slopes": _scalars(work, slopes_N),
        "first": work.first_B1T,
        "end": work.end_B1T,
        "q": q_BNTH,
        "k": k_BKTH,
        "v": v_BKTV,
    }


def _scalars(work: Work, x_N: jax.Array | None) -> jax.Array:
    return jnp.zeros(work.heads, jnp.float32) if x_N is None else x_N.astype(jnp.float32)


def _call(
    kernel: Callable[..., None],
    options: TPUOptions,
    work: Work,
    steps: Steps,
    inputs: dict[str, jax.Array],
    *,
    outputs: dict[str, tuple[tuple[int, ...], jnp.dtype]],
    scratch: list[tuple[int, ...]],
    dims: int,
) -> list[jax.Array]:
    """Run ``kernel`` at every step; what inputs and outputs are called says which block of them it sees.

    Outputs are shapes and dtypes; ``dims`` is how long the products of a query and a key are, in all.
    """
    by_query = steps is work.by_query
    grid = (work.heads // work.step_heads,) if by_query else (work.kv_heads,)
    grid += (steps.num_steps,) if by_query else (steps.num_steps, work.parts)
    semantics: Any = ("parallel", *("arbitrary",) * (len(grid) - 1))
    specs = _specs(work, by_query=by_query)
    results = [jax.ShapeDtypeStruct(*each) for each in outputs.values()]
    pairs = len(steps.tiles_W) * work.tile**2 * work.heads
    return pl.pallas_call(
        functools.partial(kernel, options, work),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=[specs[name] for name in inputs],
            out_specs=[specs[name] for name in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=results,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        cost_estimate=pl.CostEstimate(  # as if no document ended before its row
            flops=2 * dims * pairs,
            transcendentals=pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs.values(), *results)),
        ),
        interpret=options.interpret,
        name=f"flash_{kernel.__name__.removesuffix('_kernel')}",
    )(steps.tiles_W, steps.rows_and_flags_W, *inputs.values())


def _specs(work: Work, *, by_query: bool) -> dict[str, pl.BlockSpec]:
    """The block of each array at a step. The grid is (parts of heads, steps) or (kv heads, steps, parts of theirs)."""
    tile, heads, parts = work.tile, work.step_heads, work.parts

    def spec(shape, index):
        def index_map(outer, step, *inner_and_steps):
            *inner, tiles_W, rows_and_flags_W = inner_and_steps
            steps = Steps(None, tiles_W, rows_and_flags_W)
            tile, other = steps.tile(step), steps.other(step)
            if by_query:
                part, kv_head = outer, jax.lax.div(outer, np.int32(parts))  # // would ask what TPU this is
                return index(steps.row(step), part, kv_head, tile, other)
            return index(steps.row(step), outer * parts + inner[0], outer, other, tile)

        return pl.BlockSpec(shape, index_map)

    def of_queries(dim):
        return spec((None, heads, tile, dim), lambda row, part, _, query, __: (row, part, query, 0))

    def of_keys(dim):
        return spec((None, None, tile, dim), lambda row, _, kv_head, __, key: (row, kv_head, key, 0))

    a_query = spec((None, heads, 1, tile), lambda row, part, _, query, __: (row, part, 0, query))
    visible = spec((None, 1, tile), lambda row, _, __, query, ___: (row, 0, query))
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    H, V = work.key_dim, work.value_dim
    return {
        "q": of_queries(H),
        "dq": of_queries(H),
        "out": of_queries(V),
        "dout": of_queries(V),
        "k": of_keys(H),
        "dk": of_keys(H),
        "v": of_keys(V),
        "dv": of_keys(V),
        "lse": a_query,
        "delta": a_query,
        "first": visible,
        "end": visible,
        "factors": scalars,
        "slopes": scalars,
        "sinks": scalars,
    }
