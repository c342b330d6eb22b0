"""Flash attention for Hopper GPUs with every feature: Mosaic GPU kernels that visit only visible tiles.

FlashAttention-3 (arXiv 2407.08608): a warpgroup loads while two compute, which take turns at the tensor cores. The
backward pass is a kernel for queries and one for keys and values, so that nothing is added up in an order that changes
from run to run.

Legend: B batch, T query positions, S key positions, N query heads, K kv heads, H head_dim, V that of values, I tiles.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from lmjax.compat import mosaic_gpu_kernel
from lmjax.ops.attention_flash import LOG2_E, Options
from lmjax.ops.attention_mask import Mask
from lmjax.ops.attention_tiles import TileRanges, tile_ranges, visible_keys

QUERIES = 128
"""Positions of a program's queries, of which each of two warpgroups has 64."""

DIMS = 64
"""What dimensions of heads are filled up to a multiple of, with zeros."""


class Visits(NamedTuple):
    """What the kernels visit."""

    visible_B2T: Any
    """Of each query the first key that it sees and where they end; see ``VisibleKeys``."""
    is_exact_B: Any
    by_query_BI4: Any
    """Of each tile of queries the tiles of keys to visit, and those without a mask; see ``TileRanges``."""
    by_query_backward_BI4: Any
    by_key_BI4: Any


class Tiles(NamedTuple):
    """Sizes that differ between the kernels."""

    visited: int
    stages: int
    split: int = 1


def forward_tiles(dims: int) -> Tiles:
    """For heads of ``dims`` at most: what shared memory (227 KiB) and registers (240 a thread) have room for."""
    return Tiles(128, 2) if dims <= 128 else Tiles(64, 2)


def backward_tiles(dims: int) -> Tiles:
    return Tiles(64, 2) if dims <= 128 else Tiles(64, 2, split=2)


def flash_attention_hopper(
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
    interpret: Any = None,
) -> Float[Array, "batch T heads value_dim"]:
    """What ``reference_attention`` gives, in bfloat16 or float16 as q is. Residuals and NaN as ``flash_attention_tpu``.

    ``visits`` are those of ``hopper_visits`` for the same rows and mask, where they were made before. ``interpret``
    runs the kernels' programs on any platform, slowly: Pallas's InterpretGPUParams, of JAX 0.12 or newer.
    """
    options = Options(
        mask=mask,
        scale=scale,
        softcap=softcap,
        has_slopes=slopes_N is not None,
        has_sinks=sinks_N is not None,
        save_as=save_as,
        interpret=interpret,
    )
    T, V = q_BTNH.shape[1], v_BTKV.shape[3]
    if visits is None:
        visits = hopper_visits(segment_ids_BT, prefix_BT, mask=mask, dims=max(q_BTNH.shape[3], V), length=T)
    rows = [_filled(x, visits.visible_B2T.shape[2]) for x in (q_BTNH, k_BTKH, v_BTKV)]
    out_BTNV: Any = _attention(options, *rows, visits, slopes_N, sinks_N)
    return out_BTNV[:, :T, :, :V]


def hopper_visits(
    segment_ids_BT: Int[Array, "batch T"] | None,
    prefix_BT: Bool[Array, "batch T"] | None,
    *,
    mask: Mask,
    dims: int,
    length: int | None = None,
    interpret: Any = None,
) -> Visits:
    """What rows make the kernels visit, with heads of ``dims`` at most; the same in every layer with this mask.

    Where nothing depends on the rows, it is that of one row of ``length``.
    """
    del interpret
    given = segment_ids_BT if prefix_BT is None else prefix_BT
    length = length if given is None else given.shape[1]
    assert length is not None
    visible = visible_keys(mask, length, segment_ids_BT, prefix_BT)
    forward, backward = forward_tiles(dims), backward_tiles(dims)
    by_query, _ = tile_ranges(visible, QUERIES, forward.visited)
    by_query_backward, _ = tile_ranges(visible, QUERIES // backward.split, backward.visited)
    _, by_key = tile_ranges(visible, backward.visited, QUERIES // backward.split)
    xp: Any = np if given is None else jnp
    padded = length + -length % QUERIES

    def stacked(ranges: TileRanges, own: int) -> Any:
        """Also of tiles that have nothing but padding, which visit nothing."""
        x_BI4 = xp.stack(ranges, axis=-1).astype(np.int32)
        return xp.pad(x_BI4, ((0, 0), (0, padded // own - x_BI4.shape[1]), (0, 0)))

    return Visits(
        xp.pad(xp.stack([visible.first_BT, visible.end_BT], axis=1), ((0, 0), (0, 0), (0, padded - length))),
        visible.is_exact_B,
        stacked(by_query, QUERIES),
        stacked(by_query_backward, QUERIES // backward.split),
        stacked(by_key, QUERIES // backward.split),
    )


def _filled(x_BTNH: jax.Array, length: int) -> jax.Array:
    """With zeros up to ``length`` positions and a multiple of DIMS dimensions."""
    more = length - x_BTNH.shape[1], -x_BTNH.shape[3] % DIMS
    return jnp.pad(x_BTNH, ((0, 0), (0, more[0]), (0, 0), (0, more[1])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: Options, *inputs):
    return _forward(options, *inputs)[0]


def _forward(options: Options, q_BTNH, k_BTKH, v_BTKV, visits: Visits, slopes_N, sinks_N):
    from lmjax.ops import attention_flash_hopper_kernels as kernels

    B, T, N, _ = q_BTNH.shape
    out_BTNV, lse_BNT = _call(
        kernels.forward_kernel,
        kernels.forward_scratch,
        options,
        forward_tiles,
        [q_BTNH, k_BTKH, v_BTKV],
        visits,
        visits.by_query_BI4,
        slopes_N,
        [_of_heads(N, sinks_N)],
        outputs=[((B, T, N, v_BTKV.shape[3]), q_BTNH.dtype), ((B, N, T), jnp.dtype("float32"))],
        products=2,
    )
    if options.save_as is not None:
        out_BTNV, lse_BNT = (checkpoint_name(x, options.save_as) for x in (out_BTNV, lse_BNT))
    return out_BTNV, (q_BTNH, k_BTKH, v_BTKV, visits, slopes_N, sinks_N, out_BTNV, lse_BNT)


def _backward(options: Options, residuals, dout_BTNV):
    from lmjax.ops import attention_flash_hopper_kernels as kernels

    q_BTNH, k_BTKH, v_BTKV, visits, slopes_N, sinks_N, out_BTNV, lse_BNT = residuals
    delta_BNT = jnp.einsum("btnv,btnv->bnt", out_BTNV, dout_BTNV, preferred_element_type=jnp.float32)
    call = functools.partial(
        _call,
        options=options,
        tiles=backward_tiles,
        rows=[q_BTNH, k_BTKH, v_BTKV],
        visits=visits,
        slopes_N=slopes_N,
        more=[dout_BTNV, jnp.stack([lse_BNT, delta_BNT], axis=2)],
    )
    of_queries, of_keys, of_values = ((x.shape, x.dtype) for x in (q_BTNH, k_BTKH, v_BTKV))
    (dq_BTNH,) = call(
        kernels.dq_kernel, kernels.dq_scratch, ranges_BI4=visits.by_query_backward_BI4, outputs=[of_queries], products=3
    )
    dk_BTKH, dv_BTKV = call(
        kernels.dkv_kernel,
        kernels.dkv_scratch,
        ranges_BI4=visits.by_key_BI4,
        outputs=[of_keys, of_values],
        products=4,
        by_key=True,
    )
    dsinks_N = None
    if sinks_N is not None:
        weights_BNT = jnp.exp2(sinks_N.astype(jnp.float32)[:, None] * LOG2_E - lse_BNT)
        dsinks_N = -jnp.einsum("bnt,bnt->n", weights_BNT, delta_BNT).astype(sinks_N.dtype)
    return dq_BTNH, dk_BTKH, dv_BTKV, None, None, dsinks_N


_attention.defvjp(_forward, _backward)


def _of_heads(num_heads: int, x_N: jax.Array | None) -> jax.Array:
    return jnp.zeros(num_heads, jnp.float32) if x_N is None else x_N.astype(jnp.float32)


def _call(
    kernel: Callable[..., None],
    scratch: Callable[..., list[Any]],
    options: Options,
    tiles: Callable[[int], Tiles],
    rows: list[jax.Array],
    visits: Visits,
    ranges_BI4: Any,
    slopes_N: jax.Array | None,
    more: list[jax.Array],
    *,
    outputs: list[tuple[tuple[int, ...], Any]],
    products: int,
    by_key: bool = False,
) -> list[jax.Array]:
    """Run ``kernel`` for every tile of every head of every row, on queries, keys and values, ``rows``, and ``more``.

    Outputs are shapes and dtypes; ``products`` of a query and a key, or of a weight and a value, are made of each pair.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from lmjax.ops.attention_flash_hopper_parts import COMPUTING, Sizes

    (B, T, N, H), (K, V) = rows[0].shape, rows[2].shape[2:]
    visited, stages, split = tiles(max(H, V))
    sizes = Sizes(
        length=T,
        heads=N,
        kv_heads=K,
        key_dim=H,
        value_dim=V,
        dtype=rows[0].dtype,
        visited=visited,
        stages=stages,
        split=split,
    )
    factors_B = jnp.where(visits.is_exact_B, options.factor, jnp.nan).astype(jnp.float32)
    of_rows = (jnp.broadcast_to(x, (B, *x.shape[1:])) for x in (visits.visible_B2T, ranges_BI4, factors_B))
    operands = [*rows, *of_rows, _of_heads(N, slopes_N), *more]
    results = [jax.ShapeDtypeStruct(*each) for each in outputs]
    pairs = B * N * T**2  # as if all were visible
    return mosaic_gpu_kernel(
        functools.partial(kernel, options, sizes),
        out_type=results,
        scratch_types=scratch(options, sizes),
        grid=(K if by_key else N, sizes.num_own, B),
        grid_names=("head", "tile", "row"),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        kernel_name=f"flash_{kernel.__name__.removesuffix('_kernel')}",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=options.interpret,
        cost_estimate=pl.CostEstimate(
            flops=products * (H + V) * pairs,
            transcendentals=pairs,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*operands, *results)),
        ),
    )(*operands)
