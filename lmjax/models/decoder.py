"""The decoder: one class for every family, its layers in segments of a repeated pattern.

Legend: B batch, T positions, D embed, V vocab.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lmjax.models.remat import RematConfig, checkpointed
from lmjax.nn.attention import Attention
from lmjax.nn.cache import CacheWrite, LayerCache
from lmjax.nn.embed import VocabularyTable
from lmjax.nn.execution import LayerExecution
from lmjax.nn.mlp import GatedMLP
from lmjax.nn.norm import RMSNorm
from lmjax.nn.param import InitScheme, residual_std
from lmjax.nn.tags import tag
from lmjax.schema import config_class
from lmjax.sharding import activation_spec

BlockKind = Literal["full", "sliding"]


class Segment(NamedTuple):
    """A pattern of blocks that is repeated; its parameters are stacked along a first dimension of ``repeats``."""

    pattern: tuple[BlockKind, ...]
    repeats: int


@config_class
class DecoderConfig:
    """A pre-norm decoder with RMSNorm, rotary positions and a SwiGLU MLP."""

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
    mlp_dim: int
    """Width of the MLP's hidden layer."""
    layer_pattern: tuple[BlockKind, ...] = ("full",)
    """Attention of successive blocks, repeated over the depth: full, or sliding with sliding_window."""
    sliding_window: int | None = None
    """Positions that a sliding block sees, its own included."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_epsilon: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Whether the output logits are products with the embedding table itself."""
    init: InitScheme = "gpt2"
    """How the matrices are drawn; see ``lmjax.nn.param``."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                raise ValueError(f"{field.name} is {value}; it has to be above 0")
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
        if self.head_width % 2:
            raise ValueError(f"head_dim is {self.head_width}; rotary positions turn pairs, so it has to be even")
        if not self.layer_pattern:
            raise ValueError("layer_pattern is empty; name at least one kind of block")
        if ("sliding" in self.layer_pattern) != (self.sliding_window is not None):
            raise ValueError(
                f"sliding_window is {self.sliding_window} and layer_pattern is {list(self.layer_pattern)}: "
                "a pattern with sliding blocks needs a window, and a window needs such a block"
            )

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The whole repeats of the pattern, and what is left of it."""
        repeats, rest = divmod(self.num_layers, len(self.layer_pattern))
        whole = (Segment(self.layer_pattern, repeats),) if repeats else ()
        return whole + ((Segment(self.layer_pattern[:rest], 1),) if rest else ())

    def window(self, kind: BlockKind) -> int | None:
        return self.sliding_window if kind == "sliding" else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution(LayerExecution):
    """How the decoder's forward pass is carried out."""

    remat: RematConfig = dataclasses.field(default_factory=RematConfig)
    """What the backward pass finds saved."""
    scan_layers: bool = True
    """Whether one block is compiled and scanned over the stacked parameters, or every block on its own."""


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); transformers' LlamaDecoderLayer."""

    def __init__(self, config: DecoderConfig, kind: BlockKind, *, key: PRNGKeyArray):
        attention_key, mlp_key = jax.random.split(key)
        output_std = residual_std(config.init, config.num_layers)
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_epsilon)
        self.attention = Attention(
            config.embed_dim,
            config.num_heads,
            config.kv_heads,
            config.head_width,
            window=config.window(kind),
            rope_theta=config.rope_theta,
            output_std=output_std,
            key=attention_key,
        )
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_epsilon)
        self.mlp = GatedMLP(config.embed_dim, config.mlp_dim, output_std=output_std, key=mlp_key)

    def __call__(
        self,
        x_BTD: Float[Array, "batch seq embed"],
        positions_BT: Int[Array, "batch seq"],
        segment_ids_BT: Int[Array, "batch seq"] | None,
        execution: Execution,
        cache: LayerCache | None,
        write: CacheWrite | None,
    ) -> tuple[Float[Array, "batch seq embed"], LayerCache | None]:
        x_BTD = tag(x_BTD, "block_input")
        with jax.named_scope("attention"):
            y_BTD = whole_sequences(self.attention_norm(x_BTD))
            y_BTD, cache = self.attention(y_BTD, positions_BT, segment_ids_BT, execution, cache, write)
        x_BTD = x_BTD + y_BTD
        with jax.named_scope("mlp"):
            x_BTD = x_BTD + self.mlp(whole_sequences(self.mlp_norm(x_BTD)), execution)
        return x_BTD, cache


class Group(nnx.Module):
    """The blocks of one repeat of a segment's pattern."""

    def __init__(self, config: DecoderConfig, pattern: tuple[BlockKind, ...], *, key: PRNGKeyArray):
        keys = jax.random.split(key, len(pattern))
        self.blocks = nnx.List([Block(config, kind, key=keys[i]) for i, kind in enumerate(pattern)])


GroupCache = tuple[LayerCache, ...]
"""One cache a block of the pattern; stacked like the parameters."""


class Decoder(nnx.Module):
    """Token embedding, blocks, final norm, and the table of the output logits."""

    def __init__(self, config: DecoderConfig, *, key: PRNGKeyArray):
        embed_key, head_key, *segment_keys = jax.random.split(key, 2 + len(config.segments))
        self.config = config
        self.embed = VocabularyTable(config.vocab_size, config.embed_dim, key=embed_key)
        self.segments = nnx.List(
            [
                jax.vmap(lambda key, pattern=segment.pattern: Group(config, pattern, key=key))(
                    jax.random.split(segment_key, segment.repeats)
                )
                for segment, segment_key in zip(config.segments, segment_keys, strict=True)
            ]
        )
        self.final_norm = RMSNorm(config.embed_dim, config.norm_epsilon)
        self.head = (
            None if config.tie_embeddings else VocabularyTable(config.vocab_size, config.embed_dim, key=head_key)
        )

    @property
    def head_table(self) -> Float[Array, "vocab embed"]:
        """The float32 rows that the logits are products with; those beyond the vocabulary are padding."""
        return (self.embed if self.head is None else self.head).table[...]

    def hidden(
        self,
        tokens_BT: Int[Array, "batch seq"],
        positions_BT: Int[Array, "batch seq"],
        segment_ids_BT: Int[Array, "batch seq"] | None,
        execution: Execution,
    ) -> Float[Array, "batch seq embed"]:
        """What the logits are made of: the normed residual stream, in the compute dtype, sharded as between blocks."""
        x_BTD, _ = self._run(tokens_BT, positions_BT, segment_ids_BT, execution, None, None)
        return x_BTD

    def hidden_with_cache(
        self,
        tokens_BT: Int[Array, "batch seq"],
        positions_BT: Int[Array, "batch seq"],
        execution: Execution,
        cache: list[GroupCache],
        write: CacheWrite,
    ) -> tuple[Float[Array, "batch seq embed"], list[GroupCache]]:
        """The same for tokens that follow those in ``cache``; also the cache with these tokens written into it."""
        x_BTD, cache = self._run(tokens_BT, positions_BT, None, execution, cache, write)
        return x_BTD, cache

    def _run(self, tokens_BT, positions_BT, segment_ids_BT, execution, caches, write) -> tuple[Any, Any]:
        def apply(x_BTD, block, cache):
            return block(x_BTD, positions_BT, segment_ids_BT, execution, cache, write)

        def body(x_BTD, layer):
            group, group_cache = layer
            new_cache = []
            for i, block in enumerate(group.blocks):
                cache = None if group_cache is None else group_cache[i]
                x_BTD, cache = checkpointed(apply, execution.remat, scanned=execution.scan_layers)(x_BTD, block, cache)
                new_cache.append(cache)
            return x_BTD, None if group_cache is None else tuple(new_cache)

        x_BTD = self.embed(tokens_BT, execution)
        new_caches = []
        for index, segment in enumerate(self.segments):
            layers = (segment, None if caches is None else caches[index])
            if execution.scan_layers:
                x_BTD, cache = jax.lax.scan(body, x_BTD, layers)
            else:
                x_BTD, cache = _unrolled(body, x_BTD, layers)
            new_caches.append(cache)
        return self.final_norm(x_BTD), None if caches is None else new_caches


def whole_sequences(x_BTD: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
    """The residual stream with every sequence whole on its device: one all-gather over tensor, before the products."""
    return jax.sharding.reshard(x_BTD, activation_spec(("batch", "seq", "embed"), x_BTD.shape))


def _unrolled(body, x, layers):
    outputs = []
    for i in range(jax.tree.leaves(layers)[0].shape[0]):
        x, output = body(x, jax.tree.map(lambda leaf, i=i: leaf[i], layers))
        outputs.append(output)
    if outputs[0] is None:
        return x, None
    return x, jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *outputs)
