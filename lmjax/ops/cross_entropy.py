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

from lmjax.mesh import AXES, BATCH_AXES

_TABLE = P("tensor", "fsdp")
_TOKENS = P(BATCH_AXES, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What is added to the cross-entropy, and how it is cut up."""

    z_loss: float = 0.0
    """Weight of the squared log normaliser of each token (PaLM, arXiv 2204.02311 section 5; 1e-4 there)."""
    chunk_tokens: int = 2048
    """Tokens whose logits exist at once on a device; more is faster until the matrix products are large, about 2048."""


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
) -> LossSums:
    """Weighted sums of -log softmax(x table^T)[target]. Logits are float32; table rows from vocab_size on are padding.

    ``x`` is sharded as the residual stream (by sequence over ``tensor``, or not), ``table`` P(tensor, fsdp). Targets
    and weights are data. Where a gradient is asked for, it is computed together with the value, so that three matrix
    products a chunk do for both (Liger, arXiv 2410.10989 section 3.2); the gradient of the table is summed over chunks
    in float32 on each device and over devices once. Without a gradient, this is one product a chunk.
    """
    weights_BT = jax.lax.stop_gradient(weights_BT)
    return _loss(options, vocab_size, x_BTD, table_VD, targets_BT, weights_BT)


def token_nll(
    x_BTD: Float[Array, "batch seq embed"],
    table_VD: Float[Array, "vocab embed"],
    targets_BT: Int[Array, "batch seq"],
    options: LossOptions,
    *,
    vocab_size: int,
) -> Float[Array, "batch seq"]:
    """-log softmax(x table^T)[target] of each token, in nats, float32; no gradient. Arguments as above."""
    x_BTD, table_VD = jax.lax.stop_gradient((x_BTD, table_VD))
    return _token_losses(options, vocab_size, x_BTD, table_VD, targets_BT)[0]


def naive_cross_entropy(
    x_BTD: Float[Array, "batch seq embed"],
    table_VD: Float[Array, "vocab embed"],
    targets_BT: Int[Array, "batch seq"],
    weights_BT: Float[Array, "batch seq"],
    options: LossOptions,
    *,
    vocab_size: int,
) -> LossSums:
    """The same in plain jnp, all logits at once, for arrays that are not sharded: what the other is compared with."""
    table_VD = table_VD[:vocab_size].astype(x_BTD.dtype)
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, table_VD, preferred_element_type=jnp.float32)
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    nll_BT = lse_BT - jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return _sums(options, nll_BT, lse_BT, weights_BT)


def _sums(options: LossOptions, nll_BT: jax.Array, lse_BT: jax.Array, weights_BT: jax.Array) -> LossSums:
    nll = jnp.sum(nll_BT * weights_BT)
    z_loss = options.z_loss * jnp.sum(jnp.square(lse_BT) * weights_BT)
    return LossSums(nll + z_loss, nll, z_loss, jnp.sum(weights_BT))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(options, vocab_size, x_BTD, table_VD, targets_BT, weights_BT) -> LossSums:
    nll_BT, lse_BT = _token_losses(options, vocab_size, x_BTD, table_VD, targets_BT)
    return _sums(options, nll_BT, lse_BT, weights_BT)


def _loss_forward(options, vocab_size, x_BTD, table_VD, targets_BT, weights_BT):
    nll_BT, lse_BT, dx_BTD, dtable_VD = _token_losses_and_gradients(
        options, vocab_size, x_BTD, table_VD, targets_BT, weights_BT
    )
    return _sums(options, nll_BT, lse_BT, weights_BT), (dx_BTD, dtable_VD.astype(table_VD.dtype))


def _loss_backward(options, vocab_size, residuals, cotangents: LossSums):
    dx_BTD, dtable_VD = residuals
    dx_BTD = (cotangents.loss * dx_BTD.astype(jnp.float32)).astype(dx_BTD.dtype)
    return dx_BTD, cotangents.loss * dtable_VD, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _token_losses(options, vocab_size, x_BTD, table_VD, targets_BT) -> tuple[jax.Array, jax.Array]:
    """-log p(target) and the log normaliser of every token."""
    x_spec = jax.typeof(x_BTD).sharding.spec

    def local(x_BTD, table_VD, targets_BT):
        chunks = _Chunks(x_BTD.shape, x_spec, options.chunk_tokens)
        table_VD = jax.lax.all_gather(table_VD.astype(x_BTD.dtype), "fsdp", axis=1, tiled=True)

        def body(_, chunk):
            x_CD, targets_C = chunk
            logits_CV, is_target_CV = _logits(chunks.gather(x_CD), table_VD, targets_C, vocab_size)
            return None, _chunk_losses(logits_CV, is_target_CV)[:2]

        _, (nll, lse) = jax.lax.scan(body, None, (chunks.split_local(x_BTD), chunks.split_whole(targets_BT)))
        return chunks.join_whole(nll), chunks.join_whole(lse)

    return jax.shard_map(local, in_specs=(x_spec, _TABLE, _TOKENS), out_specs=(_TOKENS, _TOKENS))(
        x_BTD, table_VD, targets_BT
    )


def _token_losses_and_gradients(options, vocab_size, x_BTD, table_VD, targets_BT, weights_BT):
    """The same, and the gradients of the weighted loss with respect to x (in its dtype) and the table (float32)."""
    x_spec = jax.typeof(x_BTD).sharding.spec

    def local(x_BTD, table_VD, targets_BT, weights_BT):
        chunks = _Chunks(x_BTD.shape, x_spec, options.chunk_tokens)
        table_VD = jax.lax.all_gather(table_VD.astype(x_BTD.dtype), "fsdp", axis=1, tiled=True)

        def body(dtable_VD, chunk):
            x_CD, targets_C, weights_C = chunk
            x_CD = chunks.gather(x_CD)
            logits_CV, is_target_CV = _logits(x_CD, table_VD, targets_C, vocab_size)
            nll_C, lse_C, softmax_CV = _chunk_losses(logits_CV, is_target_CV)
            slope_C = 1 + 2 * options.z_loss * lse_C
            dlogits_CV = (weights_C[:, None] * (slope_C[:, None] * softmax_CV - is_target_CV)).astype(x_CD.dtype)
            dx_CD = chunks.sum_and_scatter(jnp.einsum("cv,vd->cd", dlogits_CV, table_VD))
            dtable_VD += jnp.einsum("cv,cd->vd", dlogits_CV, x_CD, preferred_element_type=jnp.float32)
            return dtable_VD, (nll_C, lse_C, dx_CD)

        zeros_VD = jax.lax.pcast(jnp.zeros(table_VD.shape, jnp.float32), AXES, to="varying")
        rows = (chunks.split_local(x_BTD), chunks.split_whole(targets_BT), chunks.split_whole(weights_BT))
        dtable_VD, (nll, lse, dx) = jax.lax.scan(body, zeros_VD, rows)
        dtable_VD = jax.lax.psum_scatter(dtable_VD, "fsdp", scatter_dimension=1, tiled=True)
        dtable_VD = jax.lax.psum(dtable_VD, "data")
        return chunks.join_whole(nll), chunks.join_whole(lse), chunks.join_local(dx), dtable_VD

    return jax.shard_map(
        local, in_specs=(x_spec, _TABLE, _TOKENS, _TOKENS), out_specs=(_TOKENS, _TOKENS, x_spec, _TABLE)
    )(x_BTD, table_VD, targets_BT, weights_BT)


def _logits(x_CD, table_VD, targets_C, vocab_size) -> tuple[jax.Array, jax.Array]:
    """The logits of this device's part of the vocabulary in float32, and where the targets are among them."""
    logits_CV = jnp.einsum("cd,vd->cv", x_CD, table_VD, preferred_element_type=jnp.float32)
    rows_V = jax.lax.axis_index("tensor") * table_VD.shape[0] + jnp.arange(table_VD.shape[0])
    return jnp.where(rows_V < vocab_size, logits_CV, -jnp.inf), rows_V == targets_C[:, None]


def _chunk_losses(logits_CV, is_target_CV) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-log p(target), the log normaliser, and the softmax of this device's part of the vocabulary."""
    max_C = jax.lax.pmax(jnp.max(logits_CV, axis=-1), "tensor")
    exp_CV = jnp.exp(logits_CV - max_C[:, None])
    sum_C = jax.lax.psum(jnp.sum(exp_CV, axis=-1), "tensor")
    target_C = jax.lax.psum(jnp.sum(jnp.where(is_target_CV, logits_CV, 0.0), axis=-1), "tensor")
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
