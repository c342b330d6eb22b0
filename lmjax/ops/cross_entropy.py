"""The loss: output projection and cross-entropy together, a chunk of tokens at a time, so that all logits never exist.

Legend: B batch, T positions, D embed, V vocab (one device's rows inside shard_map), C tokens of a chunk.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lmjax.mesh import AXES, BATCH_AXES, FSDP_AXES
from lmjax.ops.logits import logits

_TABLE = P("tensor", FSDP_AXES)
_BIAS = P("tensor")
_TOKENS = P(BATCH_AXES, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What is added to the cross-entropy, and how it is cut up."""

    z_loss: float = 0.0
    """Weight of the squared log normaliser of each token (PaLM, arXiv 2204.02311 section 5; 1e-4 there)."""
    chunk_tokens: int = 1024
    """Tokens whose logits exist at once on a device; more is faster until the matrix products are large, about 1024."""


class LossSums(NamedTuple):
    """Sums over the tokens of a batch, each token times its weight; float32. Only ``loss`` has a gradient."""

    loss: Float[Array, ""]
    """Cross-entropy and z-loss, in nats."""
    nll: Float[Array, ""]
    """Cross-entropy alone, in nats."""
    z_loss: Float[Array, ""]
    """What the z-loss adds."""
    weight: Float[Array, ""]
    """The weights."""


def linear_cross_entropy(
    x_BTD: Float[Array, "batch seq embed"],
    table_VD: Float[Array, "vocab embed"],
    targets_BT: Int[Array, "batch seq"],
    weights_BT: Float[Array, "batch seq"],
    options: LossOptions,
    *,
    vocab_size: int,
    bias_V: Float[Array, " vocab"] | None = None,
    softcap: float | None = None,
) -> LossSums:
    """Weighted sums of -log softmax(logits)[target]; logits = x table^T + bias in float32, capped by ``softcap``
    (``lmjax.ops.logits``). Table rows from vocab_size on are padding.

    ``x`` is sharded as the residual stream (by sequence over ``tensor``, or not), ``table`` P(tensor, FSDP_AXES),
    ``bias`` P(tensor). Targets and weights are data. Where a gradient is asked for, it is computed together with the
    value, so that three matrix products a chunk do for both (Liger, arXiv 2410.10989 section 3.2); the gradient of the
    table is summed over chunks in float32 on each device and over devices once. Without a gradient, this is one product
    a chunk.
    """
    weights_BT = jax.lax.stop_gradient(weights_BT)
    return _loss(_Static(options, vocab_size, softcap), x_BTD, table_VD, bias_V, targets_BT, weights_BT)


def token_nll(
    x_BTD: Float[Array, "batch seq embed"],
    table_VD: Float[Array, "vocab embed"],
    targets_BT: Int[Array, "batch seq"],
    options: LossOptions,
    *,
    vocab_size: int,
    bias_V: Float[Array, " vocab"] | None = None,
    softcap: float | None = None,
) -> Float[Array, "batch seq"]:
    """-log softmax(logits)[target] of each token, in nats, float32; no gradient. Arguments as above."""
    x_BTD, table_VD, bias_V = jax.lax.stop_gradient((x_BTD, table_VD, bias_V))
    return _token_losses(_Static(options, vocab_size, softcap), x_BTD, table_VD, bias_V, targets_BT)[0]


def naive_cross_entropy(
    x_BTD: Float[Array, "batch seq embed"],
    table_VD: Float[Array, "vocab embed"],
    targets_BT: Int[Array, "batch seq"],
    weights_BT: Float[Array, "batch seq"],
    options: LossOptions,
    *,
    vocab_size: int,
    bias_V: Float[Array, " vocab"] | None = None,
    softcap: float | None = None,
) -> LossSums:
    """The same in plain jnp, all logits at once, for arrays that are not sharded: what the other is compared with."""
    logits_BTV = logits(x_BTD, table_VD[:vocab_size], None if bias_V is None else bias_V[:vocab_size], softcap)
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    nll_BT = lse_BT - jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return _sums(options, nll_BT, lse_BT, weights_BT)


def _sums(options: LossOptions, nll_BT: jax.Array, lse_BT: jax.Array, weights_BT: jax.Array) -> LossSums:
    nll = jnp.sum(nll_BT * weights_BT)
    z_loss = options.z_loss * jnp.sum(jnp.square(lse_BT) * weights_BT)
    return LossSums(nll + z_loss, nll, z_loss, jnp.sum(weights_BT))


class _Static(NamedTuple):
    """What is known while compiling."""

    options: LossOptions
    vocab_size: int
    softcap: float | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(static: _Static, x_BTD, table_VD, bias_V, targets_BT, weights_BT) -> LossSums:
    nll_BT, lse_BT = _token_losses(static, x_BTD, table_VD, bias_V, targets_BT)
    return _sums(static.options, nll_BT, lse_BT, weights_BT)


def _loss_forward(static: _Static, x_BTD, table_VD, bias_V, targets_BT, weights_BT):
    nll_BT, lse_BT, dx_BTD, dtable_VD, dbias_V = _token_losses_and_gradients(
        static, x_BTD, table_VD, bias_V, targets_BT, weights_BT
    )
    # Until it is summed over devices the table's gradient is whole on each: layers go backward after that.
    dx_BTD, dtable_VD = jax.lax.optimization_barrier((dx_BTD, dtable_VD))
    dbias_V = None if dbias_V is None or bias_V is None else dbias_V.astype(bias_V.dtype)
    gradients = (dx_BTD, dtable_VD.astype(table_VD.dtype), dbias_V)
    return _sums(static.options, nll_BT, lse_BT, weights_BT), gradients


def _loss_backward(static: _Static, gradients, cotangents: LossSums):
    dx_BTD, dtable_VD, dbias_V = gradients
    dx_BTD = (cotangents.loss * dx_BTD.astype(jnp.float32)).astype(dx_BTD.dtype)
    return dx_BTD, cotangents.loss * dtable_VD, None if dbias_V is None else cotangents.loss * dbias_V, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _token_losses(static: _Static, x_BTD, table_VD, bias_V, targets_BT) -> tuple[jax.Array, jax.Array]:
    """-log p(target) and the log normaliser of every token."""
    x_spec = jax.typeof(x_BTD).sharding.spec

    def local(x_BTD, table_VD, bias_V, targets_BT):
        chunks = _Chunks(x_BTD.shape, x_spec, static.options.chunk_tokens)
        table_VD = jax.lax.all_gather(table_VD.astype(x_BTD.dtype), FSDP_AXES, axis=1, tiled=True)

        def body(_, chunk):
            x_CD, targets_C = chunk
            logits_CV, local_C = _logits(static, chunks.gather(x_CD), table_VD, bias_V, targets_C)
            return None, _chunk_losses(logits_CV, local_C)[:2]

        _, (nll, lse) = jax.lax.scan(body, None, (chunks.split_local(x_BTD), chunks.split_whole(targets_BT)))
        return chunks.join_whole(nll), chunks.join_whole(lse)

    return jax.shard_map(local, in_specs=(x_spec, _TABLE, _BIAS, _TOKENS), out_specs=(_TOKENS, _TOKENS))(
        x_BTD, table_VD, bias_V, targets_BT
    )


def _token_losses_and_gradients(static: _Static, x_BTD, table_VD, bias_V, targets_BT, weights_BT):
    """The same, and the gradients of the weighted loss: of x in its dtype, of table and bias in float32."""
    x_spec = jax.typeof(x_BTD).sharding.spec

    def local(x_BTD, table_VD, bias_V, targets_BT, weights_BT):
        chunks = _Chunks(x_BTD.shape, x_spec, static.options.chunk_tokens)
        table_VD = jax.lax.all_gather(table_VD.astype(x_BTD.dtype), FSDP_AXES, axis=1, tiled=True)

        def body(sums, chunk):
            dtable_VD, dbias_V = sums
            x_CD, targets_C, weights_C = chunk
            x_CD = chunks.gather(x_CD)
            logits_CV, local_C = _logits(static, x_CD, table_VD, bias_V, targets_C)
            nll_C, lse_C, softmax_CV = _chunk_losses(logits_CV, local_C)
            is_target_CV = jnp.arange(table_VD.shape[0]) == local_C[:, None]
            slope_C = 1 + 2 * static.options.z_loss * lse_C
            dlogits_CV = weights_C[:, None] * (slope_C[:, None] * softmax_CV - is_target_CV)
            if static.softcap is not None:  # the derivative of the cap; a padding logit has no gradient anyway
                dlogits_CV *= 1 - jnp.square(jnp.where(jnp.isfinite(logits_CV), logits_CV, 0.0) / static.softcap)
            if bias_V is not None:
                dbias_V += jnp.sum(dlogits_CV, axis=0)
            # Behind the barrier they are computed once: the compiler would do it again for the second product.
            dlogits_CV = jax.lax.optimization_barrier(dlogits_CV.astype(x_CD.dtype))
            dx_CD = chunks.sum_and_scatter(jnp.einsum("cv,vd->cd", dlogits_CV, table_VD))
            dtable_VD += jnp.einsum("cv,cd->vd", dlogits_CV, x_CD, preferred_element_type=jnp.float32)
            return (dtable_VD, dbias_V), (nll_C, lse_C, dx_CD)

        zeros = (jnp.zeros(table_VD.shape, jnp.float32), jnp.zeros(table_VD.shape[:1], jnp.float32))
        zeros = jax.lax.pcast(zeros if bias_V is not None else (zeros[0], None), AXES, to="varying")
        rows = (chunks.split_local(x_BTD), chunks.split_whole(targets_BT), chunks.split_whole(weights_BT))
        (dtable_VD, dbias_V), (nll, lse, dx) = jax.lax.scan(body, zeros, rows)
        dtable_VD = jax.lax.psum_scatter(dtable_VD, FSDP_AXES, scatter_dimension=1, tiled=True)
        dtable_VD = jax.lax.psum(dtable_VD, "data")
        dbias_V = None if dbias_V is None else jax.lax.psum(dbias_V, BATCH_AXES)
        return chunks.join_whole(nll), chunks.join_whole(lse), chunks.join_local(dx), dtable_VD, dbias_V

    return jax.shard_map(
        local,
        in_specs=(x_spec, _TABLE, _BIAS, _TOKENS, _TOKENS),
        out_specs=(_TOKENS, _TOKENS, x_spec, _TABLE, _BIAS),
    )(x_BTD, table_VD, bias_V, targets_BT, weights_BT)


def _logits(static: _Static, x_CD, table_VD, bias_V, targets_C) -> tuple[jax.Array, jax.Array]:
    """The logits of this device's part of the vocabulary in float32, and the targets' numbers in it: others are not."""
    logits_CV = logits(x_CD, table_VD, bias_V, static.softcap)
    num_rows = table_VD.shape[0]
    first = jax.lax.axis_index("tensor") * num_rows
    if num_rows * jax.lax.axis_size("tensor") > static.vocab_size:
        logits_CV = jnp.where(first + jnp.arange(num_rows) < static.vocab_size, logits_CV, -jnp.inf)
    return logits_CV, targets_C - first


def _chunk_losses(logits_CV, local_C) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-log p(target), the log normaliser, and the softmax of this device's part of the vocabulary."""
    max_C = jax.lax.pmax(jnp.max(logits_CV, axis=-1), "tensor")
    exp_CV = jnp.exp(logits_CV - max_C[:, None])
    sum_C = jax.lax.psum(jnp.sum(exp_CV, axis=-1), "tensor")
    num_rows = logits_CV.shape[1]
    found_C = jnp.take_along_axis(logits_CV, jnp.clip(local_C, 0, num_rows - 1)[:, None], axis=1)[:, 0]
    target_C = jax.lax.psum(jnp.where((local_C >= 0) & (local_C < num_rows), found_C, 0.0), "tensor")
    lse_C = max_C + jnp.log(sum_C)
    return lse_C - target_C, lse_C, exp_CV / sum_C[:, None]


class _Chunks:
    """How one device's tokens are cut into chunks of equal size, the last one filled up with zeros.

    Where x is sharded by sequence over ``tensor``, a device holds ("local") a part of the positions of x and all
    ("whole") targets; a chunk is then an equal share of every device's part, in the order in which all_gather has them.
    """

    def __init__(self, x_shape: tuple[int, ...], x_spec: P, chunk_tokens: int):
        self.batch, self.length, _ = x_shape
        self.is_split = x_spec[1] is not None
        self.shards = jax.lax.axis_size("tensor") if self.is_split else 1
        tokens = self.batch * self.length  # of one shard
        self.count = -(-tokens * self.shards // chunk_tokens)
        self.size = -(-tokens // self.count)  # of one shard's share of a chunk
        self.padding = self.count * self.size - tokens

    def split_local(self, x_BTD: jax.Array) -> jax.Array:
        """(batch, local positions, embed) to (chunks, local tokens, embed)."""
        x_ND = jnp.pad(x_BTD.reshape(-1, x_BTD.shape[2]), ((0, self.padding), (0, 0)))
        return x_ND.reshape(self.count, self.size, -1)

    def join_local(self, chunks: jax.Array) -> jax.Array:
        """The inverse of split_local."""
        embed = chunks.shape[2]
        return chunks.reshape(-1, embed)[: self.batch * self.length].reshape(self.batch, self.length, embed)

    def split_whole(self, a_BT: jax.Array) -> jax.Array:
        """(batch, positions) to (chunks, tokens), in the order of ``gather(split_local(x)[i])``."""
        a_SN = a_BT.reshape(self.batch, self.shards, self.length).swapaxes(0, 1).reshape(self.shards, -1)
        a_SN = jnp.pad(a_SN, ((0, 0), (0, self.padding)))
        return a_SN.reshape(self.shards, self.count, self.size).swapaxes(0, 1).reshape(self.count, -1)

    def join_whole(self, chunks: jax.Array) -> jax.Array:
        """The inverse of split_whole."""
        a_SN = chunks.reshape(self.count, self.shards, self.size).swapaxes(0, 1).reshape(self.shards, -1)
        a_SN = a_SN[:, : self.batch * self.length].reshape(self.shards, self.batch, self.length)
        return a_SN.swapaxes(0, 1).reshape(self.batch, -1)

    def gather(self, x_CD: jax.Array) -> jax.Array:
        """A chunk's tokens from every device that holds some of them."""
        return jax.lax.all_gather(x_CD, "tensor", axis=0, tiled=True) if self.is_split else x_CD

    def sum_and_scatter(self, dx_CD: jax.Array) -> jax.Array:
        """The transpose of ``gather`` on partial sums over the vocabulary."""
        if self.is_split:
            return jax.lax.psum_scatter(dx_CD, "tensor", scatter_dimension=0, tiled=True)
        return jax.lax.psum(dx_CD, "tensor")
