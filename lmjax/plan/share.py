"""One device's part of a train step: how much of the batch and of every width of the model it has.

Legend: B rows of a micro-batch on the device, T positions, D embed, N query heads, K kv heads, H head_dim, F hidden of
the MLP, V vocab.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

from lmjax.hardware import Hardware
from lmjax.mesh import FSDP_AXES, batch_shards
from lmjax.models.config import BlockKind, DecoderConfig
from lmjax.models.remat import RematConfig
from lmjax.nn.embed import table_rows
from lmjax.ops.attention_kernels import Choice
from lmjax.ops.expert_dispatch import capacity_of
from lmjax.ops.experts import ExpertExchange

FLOAT32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """All that a step's memory and time depend on."""

    model: DecoderConfig
    hardware: Hardware
    sizes: Mapping[str, int]
    """Devices along each axis of the mesh."""
    rows: int
    """Of a micro-batch, over all devices."""
    length: int
    """Tokens of a row."""
    accumulation: int
    """Micro-batches of a step."""
    compute_bytes: int
    """Of a number in the compute dtype."""
    remat: RematConfig
    moments_on_host: bool
    kernels: Mapping[str, Choice]
    """The attention kernel of each kind of block, and why it is this one."""
    exchange: ExpertExchange
    """How tokens reach experts on other devices."""
    loss_chunk_tokens: int
    reduce_in_float32: bool
    """Whether gradients of matrices are summed over devices in float32."""

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.rows * self.accumulation * self.length


@dataclasses.dataclass(frozen=True)
class Share:
    """What a device has of a micro-batch and of the model's widths, in numbers and in bytes of the compute dtype."""

    setup: Setup

    @functools.cached_property
    def tensor(self) -> int:
        return self.setup.sizes["tensor"]

    @functools.cached_property
    def rows(self) -> int:
        """B."""
        return self.setup.rows // batch_shards(self.setup.sizes)

    @functools.cached_property
    def tokens(self) -> int:
        """B x T."""
        return self.rows * self.setup.length

    @functools.cached_property
    def is_sequence_split(self) -> bool:
        """Whether the residual stream is split by sequence over ``tensor`` between blocks."""
        return self.tensor > 1 and self.setup.length % self.tensor == 0

    @functools.cached_property
    def heads(self) -> int:
        return self.setup.model.num_heads // self.tensor

    @functools.cached_property
    def kv_heads(self) -> int:
        """Those of the projections; attention takes of them what its query heads need."""
        kv_heads = self.setup.model.kv_heads
        return kv_heads // self.tensor if kv_heads % self.tensor == 0 else kv_heads

    @functools.cached_property
    def vocab(self) -> int:
        """Rows of a table."""
        return table_rows(self.setup.model.vocab_size) // self.tensor

    @functools.cached_property
    def table(self) -> int:
        """Numbers of a table, gathered."""
        return self.vocab * self.setup.model.embed_dim

    @functools.cached_property
    def fsdp(self) -> int:
        """Devices over which parameters are split that belong to all tokens."""
        return math.prod(self.setup.sizes[axis] for axis in FSDP_AXES)

    @functools.cached_property
    def expert_rows(self) -> int:
        """Rows of the experts on this device: as many as could come, or as there are slots."""
        moe = self.setup.model.moe
        assert moe is not None
        if moe.capacity_factor is not None:
            capacity = capacity_of(self.setup.length, moe.num_experts, moe.experts_per_token, moe.capacity_factor)
            return moe.num_experts * self.rows * capacity
        shards = self.setup.sizes["expert"]
        return shards * self.tokens * min(moe.num_experts // shards, moe.experts_per_token)

    @functools.cached_property
    def is_ragged(self) -> bool:
        """Whether rows go to the experts' devices by a ragged all-to-all."""
        moe = self.setup.model.moe
        return moe is not None and moe.capacity_factor is None and self.setup.exchange == "ragged"

    @functools.cached_property
    def residual(self) -> int:
        """Bytes of the residual stream between blocks."""
        return self.whole // (self.tensor if self.is_sequence_split else 1)

    @functools.cached_property
    def whole(self) -> int:
        """Bytes of the residual stream with whole sequences."""
        return self.tokens * self.setup.model.embed_dim * self.setup.compute_bytes

    @functools.cached_property
    def pairs(self) -> int:
        """Scores of all heads, where they exist at once."""
        return self.rows * self.heads * self.setup.length**2

    @functools.cached_property
    def attention(self) -> "AttentionBytes":
        model, c = self.setup.model, self.setup.compute_bytes
        heads, kv_heads = self.heads * self.tokens, self.kv_heads * self.tokens
        latent = 0 if model.latent is None else model.latent.kv_rank + (model.latent.query_rank or 0)
        return AttentionBytes(
            query=heads * model.head_width * c,
            key=kv_heads * model.head_width * c,
            value=kv_heads * model.value_width * c,
            out=heads * model.value_width * c,
            statistics=heads * FLOAT32,
            latent=self.tokens * latent * c,
            latent_key=0 if model.latent is None else self.tokens * model.latent.rope_dim * c,
        )

    def feed_forward(self, kind: BlockKind) -> "FeedForwardBytes":
        """Of a block's MLP, or its experts and what they have beside them."""
        model, moe, c = self.setup.model, self.setup.model.moe, self.setup.compute_bytes
        if kind.mlp == "dense" or moe is None:
            width = model.mlp_dim // self.tensor
            return FeedForwardBytes(self.tokens * width * c, 0, model.embed_dim * width * c)
        width = model.expert_dim // self.tensor
        experts = moe.num_experts // self.setup.sizes["expert"]
        shared = self.tokens * (moe.shared_dim or 0) // self.tensor * c
        return FeedForwardBytes(
            hidden=self.expert_rows * width * c + shared,
            rows=self.expert_rows * model.embed_dim * c,
            matrix=experts * model.embed_dim * width * c,
        )


class AttentionBytes(NamedTuple):
    """What a block's attention works on."""

    query: int
    key: int
    value: int
    out: int
    statistics: int
    """The logarithm of the normaliser of every query and head, float32."""
    latent: int
    """The narrow vectors of latent attention, whole on each device; 0 without it."""
    latent_key: int
    """Its rotated key, one for all heads."""


class FeedForwardBytes(NamedTuple):
    """What the feed-forward half of a block works on."""

    hidden: int
    """The hidden layer of the MLP, or of the experts on this device."""
    rows: int
    """The experts' input or output; 0 without experts."""
    matrix: int
    """A gathered matrix, or those of all experts on this device."""
