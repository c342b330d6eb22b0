"""What a decoder is: one switch for each way in which families differ. No family has a name here."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from lmjax.hardware import Hardware
from lmjax.nn.attention import AttentionOptions
from lmjax.nn.attention_latent import LatentConfig
from lmjax.nn.mlp import Activation
from lmjax.nn.moe import MLPKind, MoEConfig
from lmjax.nn.norm import NormKind
from lmjax.nn.param import InitScheme
from lmjax.nn.position import Rope, alibi_slopes
from lmjax.nn.rope_scaling import LongRopeScaling, RopeScaling
from lmjax.ops.attention_kernels import Wanted, wanted_features
from lmjax.ops.attention_mask import Mask
from lmjax.schema import config_class

AttentionKind = Literal["full", "sliding"]


class BlockKind(NamedTuple):
    """What the two halves of a block are."""

    attention: AttentionKind
    mlp: MLPKind = "dense"


class Segment(NamedTuple):
    """A pattern of blocks that is repeated; its parameters are stacked along a first dimension of ``repeats``."""

    pattern: tuple[BlockKind, ...]
    repeats: int


@config_class
class DecoderConfig:
    """A decoder-only transformer; by default with RMSNorm, rotary positions and a SwiGLU MLP, as Llama."""

    vocab_size: int
    """Tokens that the model knows; at least as many as the tokenizer has."""
    max_length: int
    """Positions that the model is made for; the longest row it is trained or run on."""
    embed_dim: int
    """Width of the residual stream."""
    num_layers: int
    """Blocks."""
    num_heads: int
    """Query heads of each attention."""
    num_kv_heads: int | None = None
    """Key and value heads, each shared by num_heads / num_kv_heads query heads; num_heads of them by default."""
    head_dim: int | None = None
    """Width of a head; embed_dim / num_heads by default."""
    latent: LatentConfig | None = None
    """Keys and values made of one narrow vector a token (multi-head latent attention), with head_dim as the width of
    queries and keys; null makes them of the residual stream."""
    mlp_dim: int
    """Width of the MLP's hidden layer."""
    moe: MoEConfig | None = None
    """Experts instead of the MLP, in all blocks or some; null has none."""
    layer_pattern: tuple[AttentionKind, ...] = ("full",)
    """Attention of successive blocks, repeated over the depth: full, or sliding with sliding_window."""
    sliding_window: int | None = None
    """Positions that a sliding block sees, its own included."""

    norm: NormKind = "rms"
    """rms: RMSNorm; layer: LayerNorm."""
    norm_epsilon: float = 1e-5
    """Added to the mean square, or the variance."""
    norm_bias: bool = False
    """Whether LayerNorm has a bias."""
    norm_unit_offset: bool = False
    """Whether the scale is 1 + parameter."""
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    """Norms before attention and MLP, on their results before these are added, or both."""
    residual: Literal["sequential", "parallel", "parallel_shared_norm"] = "sequential"
    """Whether the MLP reads what attention wrote, or both read the block's input, each normed or through one norm."""
    embed_norm: bool = False
    """Whether the embeddings are normed."""

    activation: Activation = "silu"
    """Of the MLP's hidden layer: silu, gelu (exact), gelu_tanh or relu."""
    mlp_gated: bool = True
    """Whether the activated half is multiplied with a second projection."""

    qkv_bias: bool = False
    """Whether query, key and value projections have biases."""
    attention_out_bias: bool = False
    """Whether attention's output projection has one."""
    mlp_bias: bool = False
    """Whether the MLP's projections have them."""
    head_bias: bool = False
    """Whether the logits have one."""

    position: Literal["rope", "alibi", "learned", "sinusoidal", "none"] = "rope"
    """How positions are told: rotary, biases by the distance, a table or sinusoids added to embeddings, or not."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_theta_sliding: float | None = None
    """Base in sliding blocks, which rope_scaling then leaves alone; as in full ones by default."""
    rope_fraction: float = 1.0
    """Part of each head that is rotated, from its first dimension on."""
    rope_interleaved: bool = False
    """Whether dimensions 2i and 2i + 1 are turned together, instead of i and i + half."""
    rope_scaling: RopeScaling | None = None
    """How frequencies change for rows longer than those first trained on."""
    alibi_max: float = 8.0
    """The smallest slope is 2^-alibi_max."""
    alibi_scale: float = 1.0
    """Factor of all slopes."""

    qk_norm: Literal["head", "full"] | None = None
    """Norm of queries and keys: of each head, or of all heads together."""
    query_scale: float | None = None
    """Factor of the products of queries and keys; head_dim^-0.5 by default."""
    attention_softcap: float | None = None
    """Scores become cap x tanh(score / cap)."""
    attention_sinks: bool = False
    """Whether each head has a score that takes part in the softmax and has no value."""
    qkv_clip: float | None = None
    """Largest absolute value of queries, keys and values after their projections and norms."""

    tie_embeddings: bool = False
    """Whether the output logits are products with the embedding table itself."""
    logit_softcap: float | None = None
    """Logits become cap x tanh(logit / cap)."""
    embed_multiplier: float = 1.0
    """Factor of the embeddings."""
    residual_multiplier: float = 1.0
    """Factor of what attention and MLP add to the residual stream."""
    logit_multiplier: float = 1.0
    """Factor of the products of the last hidden state with the output table."""
    dropout: float = 0.0
    """Part of the embeddings, and of what attention and MLP add, that is zeroed in training."""
    init: InitScheme = "gpt2"
    """How the matrices are drawn; see ``lmjax.nn.param``."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_heads()
        if self.latent is not None:
            self._check_latent(self.latent)
        self._check_positions()
        if ("sliding" in self.layer_pattern) != (self.sliding_window is not None):
            raise ValueError(
                f"sliding_window is {self.sliding_window} and layer_pattern is {list(self.layer_pattern)}: "
                "a pattern with sliding blocks needs a window, and a window needs such a block"
            )
        if not self.layer_pattern:
            raise ValueError("layer_pattern is empty; name at least one kind of block")
        if self.moe is not None:
            self._check_moe(self.moe)
        if self.norm_bias and self.norm == "rms":
            raise ValueError("norm_bias is true and norm is rms, which has no bias; leave it out, or set norm=layer")
        if self.residual != "sequential" and self.norm_placement != "pre":
            raise ValueError(
                f"residual is {self.residual} and norm_placement is {self.norm_placement}: parallel branches have "
                "their norms before them, so set norm_placement=pre or residual=sequential"
            )

    def _check_numbers(self) -> None:
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if is_number and value <= 0 and field.name != "dropout":
                raise ValueError(f"{field.name} is {value}; it has to be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it has to be at least 0 and below 1")

    def _check_moe(self, moe: MoEConfig) -> None:
        if self.mlp_bias:
            raise ValueError("mlp_bias is true and there are experts, whose projections have no biases; leave it out")
        kinds = {kind.mlp for kind in self.blocks}
        if "moe" not in kinds:
            raise ValueError(
                f"moe.dense_first {moe.dense_first} and moe.pattern {list(moe.pattern)} leave no moe block among the "
                f"num_layers {self.num_layers}"
            )
        if "dense" not in kinds and moe.expert_dim is not None:
            raise ValueError(
                "moe.expert_dim is given and no block is dense, so that mlp_dim has no effect; give the experts' width "
                "as mlp_dim and leave moe.expert_dim out"
            )

    def _check_heads(self) -> None:
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} does not divide into num_heads {self.num_heads}: "
                f"{self.embed_dim} mod {self.num_heads} = {self.embed_dim % self.num_heads}. Set head_dim, or change "
                "one of them"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}: each key and value "
                "head serves the same number of query heads"
            )

    def _check_latent(self, latent: LatentConfig) -> None:
        if self.head_dim is None or self.head_dim <= latent.rope_dim:
            raise ValueError(
                f"latent.rope_dim is {latent.rope_dim} and head_dim {self.head_dim}: give a head_dim above rope_dim, "
                "the width of queries and keys with what is rotated of them"
            )
        ineffective = {
            "num_kv_heads": self.kv_heads != self.num_heads,
            "position": self.position != "rope",
            "rope_fraction": self.rope_fraction != 1,
            "qk_norm": self.qk_norm is not None,
            "qkv_bias": self.qkv_bias,
            "qkv_clip": self.qkv_clip is not None,
        }
        if given := [name for name, is_given in ineffective.items() if is_given]:
            raise ValueError(
                f"{given[0]} is {getattr(self, given[0])} and latent is given: there each head has keys of its own, "
                "rotated as latent.rope_dim says, without norm, bias or limit. Leave one of the two out"
            )

    def _check_positions(self) -> None:
        owners = {
            "rope": ("rope_theta", "rope_theta_sliding", "rope_fraction", "rope_interleaved", "rope_scaling"),
            "alibi": ("alibi_max", "alibi_scale"),
        }
        defaults = {field.name: field.default for field in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]
        for position, names in owners.items():
            for name in names:
                if self.position != position and getattr(self, name) != defaults[name]:
                    raise ValueError(f"{name} has an effect with position={position} only, not {self.position}")
        if self.position == "sinusoidal" and self.embed_dim % 2:
            raise ValueError(f"embed_dim is {self.embed_dim}; sinusoidal positions come in pairs, so it has to be even")
        if self.position != "rope":
            return
        for name in ("rope_theta", "rope_theta_sliding"):
            if (theta := getattr(self, name)) is not None and theta <= 1:
                raise ValueError(f"{name} is {theta}; it has to be above 1")
        if self.rope_fraction > 1:
            raise ValueError(f"rope_fraction is {self.rope_fraction}; it is a part of a head, so at most 1")
        if self.rope_width % 2 or not self.rope_width:
            what = "head_dim" if self.rope_fraction == 1 else "the rotated part of a head, head_dim x rope_fraction,"
            what = what if self.latent is None else "latent.rope_dim"
            raise ValueError(f"{what} is {self.rope_width}; rotary positions turn pairs, so it has to be even")
        if self.rope_theta_sliding is not None and "sliding" not in self.layer_pattern:
            raise ValueError("rope_theta_sliding has an effect in sliding blocks only, and layer_pattern has none")
        scaling = self.rope_scaling
        if isinstance(scaling, LongRopeScaling) and len(scaling.short_factors) != self.rope_width // 2:
            raise ValueError(
                f"rope_scaling has {len(scaling.short_factors)} factors and a head {self.rope_width // 2} rotated "
                "pairs: each pair has one factor"
            )

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def value_width(self) -> int:
        """Of a head's values."""
        return self.head_width if self.latent is None else self.latent.value_dim

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Heads in a KV cache, and the widths of their keys and values."""
        if self.latent is None:
            return self.kv_heads, self.head_width, self.head_width
        return 1, self.latent.kv_rank + self.latent.rope_dim, self.latent.kv_rank

    @property
    def rope_width(self) -> int:
        """Dimensions of a head that are rotated."""
        if self.latent is not None:
            return self.latent.rope_dim
        return int(self.head_width * self.rope_fraction)

    @property
    def _slopes(self) -> tuple[float, ...]:
        return tuple(float(slope) for slope in self.alibi_scale * alibi_slopes(self.num_heads, self.alibi_max))

    @property
    def blocks(self) -> tuple[BlockKind, ...]:
        """The kind of every block, from the first to the last."""
        attention, moe = self.layer_pattern, self.moe

        def mlp(number: int) -> MLPKind:
            if moe is None or number < moe.dense_first:
                return "dense"
            return moe.pattern[(number - moe.dense_first) % len(moe.pattern)]

        return tuple(BlockKind(attention[i % len(attention)], mlp(i)) for i in range(self.num_layers))

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The blocks as repeats of a pattern, and what is left of it; dense first ones are apart."""
        period = len(self.layer_pattern)
        if self.moe is None:
            return tuple(_segments(self.blocks, period))
        first, rest = self.blocks[: self.moe.dense_first], self.blocks[self.moe.dense_first :]
        return (*_segments(first, period), *_segments(rest, math.lcm(period, len(self.moe.pattern))))

    @property
    def expert_dim(self) -> int:
        """Width of an expert's hidden layer."""
        assert self.moe is not None
        return self.mlp_dim if self.moe.expert_dim is None else self.moe.expert_dim

    def window(self, kind: AttentionKind) -> int | None:
        return self.sliding_window if kind == "sliding" else None

    def rope(self, kind: AttentionKind) -> Rope | None:
        """The rotation of queries and keys in blocks of this kind."""
        if self.position != "rope":
            return None
        own = kind == "sliding" and self.rope_theta_sliding is not None
        return Rope(
            width=self.rope_width,
            theta=self.rope_theta_sliding if own else self.rope_theta,  # pyright: ignore[reportArgumentType]
            interleaved=self.rope_interleaved,
            scaling=None if own else self.rope_scaling,
        )

    def attention(self, kind: AttentionKind) -> AttentionOptions:
        """The attention of blocks of this kind."""
        return AttentionOptions(
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_width,
            window=self.window(kind),
            rope=self.rope(kind),
            slopes=self._slopes if self.position == "alibi" else None,
            qk_norm=self.qk_norm,
            norm=self.norm,
            norm_epsilon=self.norm_epsilon,
            norm_unit_offset=self.norm_unit_offset,
            query_scale=self.head_width**-0.5 if self.query_scale is None else self.query_scale,
            softcap=self.attention_softcap,
            sinks=self.attention_sinks,
            qkv_clip=self.qkv_clip,
            qkv_bias=self.qkv_bias,
            out_bias=self.attention_out_bias,
        )

    def mask(self, kind: AttentionKind) -> Mask:
        return Mask(causal=True, window=self.window(kind))

    def wanted_attention(
        self,
        kind: AttentionKind,
        *,
        hardware: Hardware,
        length: int,
        dtype: str,
        segments: bool = True,
        prefix: bool = False,
    ) -> Wanted:
        """What blocks of this kind ask of a kernel, by default for packed rows."""
        features = wanted_features(
            self.mask(kind),
            segments=segments,
            prefix=prefix,
            softcap=self.attention_softcap is not None,
            alibi=self.position == "alibi",
            sinks=self.attention_sinks,
        )
        return Wanted(
            features=features,
            hardware=hardware,
            length=length,
            head_dim=self.head_width,
            value_dim=self.value_width,
            dtype=dtype,
        )


def _segments(blocks: Sequence[BlockKind], period: int) -> Iterator[Segment]:
    repeats, rest = divmod(len(blocks), period)
    if repeats:
        yield Segment(tuple(blocks[:period]), repeats)
    if rest:
        yield Segment(tuple(blocks[-rest:]), 1)
