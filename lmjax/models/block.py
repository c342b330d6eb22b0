"""One block of the decoder, and what all blocks of a forward pass share.

Legend: B batch, T positions, D embed.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lmjax.models.config import AttentionKind, BlockKind, DecoderConfig
from lmjax.models.remat import RematConfig
from lmjax.nn.attention import Attention, Rows
from lmjax.nn.attention_latent import LatentAttention
from lmjax.nn.cache import CacheWrite, LayerCache
from lmjax.nn.execution import LayerExecution
from lmjax.nn.mlp import MLP
from lmjax.nn.moe import MoE
from lmjax.nn.noise import Noise
from lmjax.nn.norm import Norm
from lmjax.nn.param import residual_std
from lmjax.nn.position import Rotation
from lmjax.nn.tags import tag
from lmjax.ops.routing import RouterSums
from lmjax.sharding import activation_spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution(LayerExecution):
    """How the decoder's forward pass is carried out."""

    remat: RematConfig = dataclasses.field(default_factory=RematConfig)
    """What the backward pass finds saved."""
    scan_layers: bool = True
    """Whether one block is compiled and scanned over the stacked parameters, or every block on its own."""


class Forward(NamedTuple):
    """What all blocks of one forward pass share."""

    rows: Rows
    rotations: dict[AttentionKind, Rotation | None]
    visits: dict[AttentionKind, Any]
    """Both are made once: the same in every block of a kind. See ``Rows.visits``."""
    execution: Execution
    noise: Noise | None
    """None outside of training."""
    write: CacheWrite | None

    @property
    def valid_BT(self) -> Bool[Array, "batch seq"]:
        """Tokens that are not padding."""
        segments_BT = self.rows.segment_ids_BT
        return self.rows.positions_BT >= 0 if segments_BT is None else segments_BT > 0


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); norms and order as the config says."""

    def __init__(self, config: DecoderConfig, kind: BlockKind, *, key: PRNGKeyArray):
        attention_key, mlp_key = jax.random.split(key)
        output_std = residual_std(config.init, config.num_layers)
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        self.kind: BlockKind = kind
        self.is_parallel = config.residual != "sequential"
        self.shares_norm = config.residual == "parallel_shared_norm"
        self.multiplier = config.residual_multiplier
        self.attention_norm = make_norm(config) if before else None
        self.attention = make_attention(config, kind.attention, output_std, attention_key)
        self.attention_post_norm = make_norm(config) if after else None
        self.mlp_norm = make_norm(config) if before and not self.shares_norm else None
        self.mlp = make_mlp(config, output_std, mlp_key) if kind.mlp == "dense" else None
        self.moe = make_moe(config, output_std, mlp_key) if kind.mlp == "moe" else None
        self.mlp_post_norm = make_norm(config) if after else None

    def __call__(
        self, x_BTD: Float[Array, "batch seq embed"], forward: Forward, layer: jax.Array, cache: LayerCache | None
    ) -> tuple[Float[Array, "batch seq embed"], LayerCache | None, RouterSums | None]:
        """``layer`` is the number of this block, from 0. The sums are None where the block is dense."""
        x_BTD = tag(x_BTD, "block_input")
        with jax.named_scope("attention"):
            normed_BTD = whole_sequences(normed(self.attention_norm, x_BTD))
            rotation = forward.rotations[self.kind.attention]
            rows = forward.rows._replace(visits=forward.visits[self.kind.attention])
            y_BTD, cache = self.attention(normed_BTD, rows, rotation, forward.execution, cache, forward.write)
        attended_BTD = x_BTD + self._branch(y_BTD, self.attention_post_norm, forward.noise, 2 * layer + 1)
        with jax.named_scope("mlp"):
            if not self.shares_norm:
                normed_BTD = whole_sequences(normed(self.mlp_norm, x_BTD if self.is_parallel else attended_BTD))
            y_BTD, sums = self._feed_forward(normed_BTD, forward, 2 * layer + 2)
        return attended_BTD + self._branch(y_BTD, self.mlp_post_norm, forward.noise, 2 * layer + 2), cache, sums

    def _feed_forward(self, x_BTD, forward: Forward, place: jax.Array):
        if self.moe is None:
            assert self.mlp is not None
            return self.mlp(x_BTD, forward.execution), None
        keys_B = None if forward.noise is None else forward.noise.keys(place)
        may_drop = forward.write is None
        return self.moe(x_BTD, forward.valid_BT, forward.execution, keys_B=keys_B, may_drop=may_drop)

    def _branch(self, y_BTD, post_norm: Norm | None, noise: Noise | None, place: jax.Array):
        """What is added to the residual stream of a branch's result."""
        y_BTD = normed(post_norm, y_BTD)
        if noise is not None:
            y_BTD = noise.dropout(y_BTD, place)
        return y_BTD if self.multiplier == 1 else y_BTD * jnp.asarray(self.multiplier, y_BTD.dtype)


def make_attention(
    config: DecoderConfig, kind: AttentionKind, output_std: float, key: PRNGKeyArray
) -> Attention | LatentAttention:
    """The attention half of a block."""
    options = config.attention(kind)
    if config.latent is not None:
        return LatentAttention(options, config.latent, output_std=output_std, key=key)
    return Attention(options, output_std=output_std, key=key)


def make_mlp(config: DecoderConfig, output_std: float, key: PRNGKeyArray) -> MLP:
    """The feed-forward half of a dense block."""
    return MLP(
        config.embed_dim,
        config.mlp_dim,
        activation=config.activation,
        gated=config.mlp_gated,
        bias=config.mlp_bias,
        output_std=output_std,
        key=key,
    )


def make_moe(config: DecoderConfig, output_std: float, key: PRNGKeyArray) -> MoE:
    """The feed-forward half of a block with experts."""
    assert config.moe is not None
    return MoE(
        config.moe,
        config.embed_dim,
        config.expert_dim,
        activation=config.activation,
        gated=config.mlp_gated,
        output_std=output_std,
        key=key,
    )


def make_norm(config: DecoderConfig) -> Norm:
    """A norm of the residual stream, or of what is added to it."""
    return Norm(
        config.norm,
        (config.embed_dim,),
        config.norm_epsilon,
        unit_offset=config.norm_unit_offset,
        bias=config.norm_bias,
    )


def normed(norm: Norm | None, x_BTD: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
    """``x``, through ``norm`` where the block has one in this place."""
    return x_BTD if norm is None else norm(x_BTD)


def whole_sequences(x_BTD: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
    """The residual stream with every sequence whole on its device: one all-gather over tensor, before the products."""
    return jax.sharding.reshard(x_BTD, activation_spec(("batch", "seq", "embed"), x_BTD.shape))
