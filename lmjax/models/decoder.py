"""The decoder: one class for every family, its layers in segments of a repeated pattern.

Legend: B batch, T positions, D embed, V vocab.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lmjax.models.block import Block, Execution, Forward, make_norm
from lmjax.models.config import AttentionKind, BlockKind, DecoderConfig
from lmjax.models.remat import checkpointed
from lmjax.nn.attention import Rows
from lmjax.nn.cache import CacheWrite, LayerCache
from lmjax.nn.embed import Table, table_rows
from lmjax.nn.noise import Noise
from lmjax.nn.param import constant
from lmjax.nn.position import Rotation, document_lengths, sinusoids
from lmjax.ops.attention import attention_visits
from lmjax.ops.logits import logits
from lmjax.ops.routing import RouterSums


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
        self.embed = Table(config.vocab_size, config.embed_dim, key=embed_key)
        position_key = jax.random.fold_in(embed_key, 1)
        is_learned = config.position == "learned"
        self.position = Table(config.max_length, config.embed_dim, key=position_key) if is_learned else None
        self.embed_norm = make_norm(config) if config.embed_norm else None
        self.segments = nnx.List(
            [
                jax.vmap(lambda key, pattern=segment.pattern: Group(config, pattern, key=key))(
                    jax.random.split(segment_key, segment.repeats)
                )
                for segment, segment_key in zip(config.segments, segment_keys, strict=True)
            ]
        )
        self.final_norm = make_norm(config)
        self.head = None if config.tie_embeddings else Table(config.vocab_size, config.embed_dim, key=head_key)
        self.head_bias = constant(0.0, (table_rows(config.vocab_size),), ("vocab",)) if config.head_bias else None

    @property
    def head_table(self) -> Float[Array, "vocab embed"]:
        """The float32 rows that the logits are products with; those beyond the vocabulary are padding."""
        return (self.embed if self.head is None else self.head).table[...]

    @property
    def head_arguments(self) -> dict[str, Any]:
        """What the loss (``lmjax.ops.cross_entropy``) has to know of the logits besides the table."""
        return {
            "vocab_size": self.config.vocab_size,
            "bias_V": None if self.head_bias is None else self.head_bias[...],
            "softcap": self.config.logit_softcap,
        }

    def logits(self, hidden: Float[Array, "*rows embed"], out_spec: Any = None) -> Float[Array, "*rows vocab"]:
        """The float32 logits of hidden states; those beyond the vocabulary mean nothing."""
        bias_V = self.head_arguments["bias_V"]
        return logits(hidden, self.head_table, bias_V, self.config.logit_softcap, out_spec)

    def hidden(
        self,
        tokens_BT: Int[Array, "batch seq"],
        positions_BT: Int[Array, "batch seq"],
        segment_ids_BT: Int[Array, "batch seq"] | None,
        execution: Execution,
        *,
        prefix_BT: Bool[Array, "batch seq"] | None = None,
        noise_keys_B: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """What the logits are made of: the normed residual stream, in the compute dtype, sharded as between blocks.

        Tokens where ``prefix`` is true are seen by all of their segment (prefix-LM). With ``noise_keys`` (one a row)
        the config's dropout and jitter are applied, as in training; without them they are not.
        """
        return self.hidden_and_router(
            tokens_BT, positions_BT, segment_ids_BT, execution, prefix_BT=prefix_BT, noise_keys_B=noise_keys_B
        )[0]

    def hidden_and_router(
        self,
        tokens_BT: Int[Array, "batch seq"],
        positions_BT: Int[Array, "batch seq"],
        segment_ids_BT: Int[Array, "batch seq"] | None,
        execution: Execution,
        *,
        prefix_BT: Bool[Array, "batch seq"] | None = None,
        noise_keys_B: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], RouterSums | None]:
        """The same, and what the routers did: of each block with experts, in their order. None where there is none."""
        noise = None if noise_keys_B is None else Noise(noise_keys_B, self.config.dropout)
        rows = Rows(positions_BT, segment_ids_BT, prefix_BT)
        x_BTD, _, sums = self._run(tokens_BT, self._forward(rows, execution, noise, None), None)
        return x_BTD, sums

    def hidden_with_cache(
        self,
        tokens_BT: Int[Array, "batch seq"],
        positions_BT: Int[Array, "batch seq"],
        execution: Execution,
        cache: list[GroupCache],
        write: CacheWrite,
    ) -> tuple[Float[Array, "batch seq embed"], list[GroupCache]]:
        """The same for tokens that follow those in ``cache``; also the cache with these tokens written into it."""
        forward = self._forward(Rows(positions_BT, None, None), execution, None, write)
        return self._run(tokens_BT, forward, cache)[:2]

    def _forward(self, rows: Rows, execution, noise, write) -> Forward:
        lengths_BT = None
        if write is not None:
            lengths_BT = write.length_B[:, None]
        elif rows.segment_ids_BT is not None:
            lengths_BT = document_lengths(rows.positions_BT, rows.segment_ids_BT)
        rotations: dict[AttentionKind, Rotation | None] = {}
        visits: dict[AttentionKind, Any] = {}
        for kind in self.config.layer_pattern:
            rope = self.config.rope(kind)
            rotations[kind] = None if rope is None else rope.rotation(rows.positions_BT, lengths_BT)
            visits[kind] = None if write is not None else self._visits(kind, rows, execution)
        return Forward(rows, rotations, visits, execution, noise, write)

    def _visits(self, kind: AttentionKind, rows: Rows, execution: Execution) -> Any:
        wanted = self.config.wanted_attention(
            kind,
            hardware=execution.hardware,
            length=rows.positions_BT.shape[1],
            dtype=str(execution.compute_dtype),
            segments=rows.segment_ids_BT is not None,
            prefix=rows.prefix_BT is not None,
        )
        mask = self.config.mask(kind)
        return attention_visits(wanted, mask, rows.segment_ids_BT, rows.prefix_BT, execution.attention_kernel)

    def _embedded(self, tokens_BT, forward: Forward) -> Float[Array, "batch seq embed"]:
        config = self.config
        x_BTD = self.embed(tokens_BT, forward.execution)
        if config.embed_multiplier != 1:
            x_BTD = x_BTD * jnp.asarray(config.embed_multiplier, x_BTD.dtype)
        positions_BT = jnp.maximum(forward.rows.positions_BT, 0)  # -1 is padding, in generation
        if self.position is not None:
            x_BTD = x_BTD + self.position(positions_BT, forward.execution)
        elif config.position == "sinusoidal":
            added_BTD = jax.sharding.reshard(sinusoids(positions_BT, config.embed_dim), jax.typeof(x_BTD).sharding.spec)
            x_BTD = x_BTD + added_BTD.astype(x_BTD.dtype)
        if self.embed_norm is not None:
            x_BTD = self.embed_norm(x_BTD)
        return x_BTD if forward.noise is None else forward.noise.dropout(x_BTD, jnp.asarray(0))

    def _run(self, tokens_BT, forward: Forward, caches) -> tuple[Any, Any, RouterSums | None]:
        execution = forward.execution

        def apply(x_BTD, block, layer, index, cache):
            write = None if forward.write is None else forward.write._replace(layer=index)
            return block(x_BTD, forward._replace(write=write), layer, cache)

        def body(carry, layers):
            x_BTD, group_cache = carry
            group, first, index = layers
            new_cache, sums = [], []
            is_alone = execution.scan_layers and len(group.blocks) == 1
            run = checkpointed(apply, execution.remat, is_alone=is_alone)
            for i, block in enumerate(group.blocks):
                cache = None if group_cache is None else group_cache[i]
                x_BTD, cache, of_router = run(x_BTD, block, first + i, index, cache)
                new_cache.append(cache)
                sums += [] if of_router is None else [of_router]
            stacked = jax.tree.map(lambda *of_blocks: jnp.stack(of_blocks), *sums) if sums else None
            return (x_BTD, None if group_cache is None else tuple(new_cache)), stacked

        x_BTD = self._embedded(tokens_BT, forward)
        new_caches, all_sums, num_before = [], [], 0
        for i, (segment, shape) in enumerate(zip(self.segments, self.config.segments, strict=True)):
            indices = jnp.arange(shape.repeats)
            layers = (segment, num_before + len(shape.pattern) * indices, indices)
            # The stacked cache is carried, not scanned over, so that it is updated in place.
            carry = (x_BTD, None if caches is None else caches[i])
            scan = jax.lax.scan if execution.scan_layers else _unrolled
            (x_BTD, cache), sums = scan(body, carry, layers)
            new_caches.append(cache)
            all_sums += [] if sums is None else [sums]
            num_before += len(shape.pattern) * shape.repeats
        x_BTD = self.final_norm(x_BTD)
        if self.config.logit_multiplier != 1:
            x_BTD = x_BTD * jnp.asarray(self.config.logit_multiplier, x_BTD.dtype)
        # Of each segment (repeats, blocks with experts of a group, …): one after the other in the order of the depth.
        in_order = lambda *sums: jnp.concatenate([leaf.reshape(-1, *leaf.shape[2:]) for leaf in sums])  # noqa: E731
        router_sums = jax.tree.map(in_order, *all_sums) if all_sums else None
        return x_BTD, None if caches is None else new_caches, router_sums


def _unrolled(body, carry, layers):
    results = []
    for i in range(jax.tree.leaves(layers)[0].shape[0]):
        carry, result = body(carry, jax.tree.map(lambda leaf, i=i: leaf[i], layers))
        results.append(result)
    return carry, jax.tree.map(lambda *of_groups: jnp.stack(of_groups), *results)
