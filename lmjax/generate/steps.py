"""What the devices do to continue prompts: a prefill of the cache, then one token a step.

Legend: B batch, P columns of the prompts, C columns of a part of them, S slots of the cache, D embed, V vocab, N new
tokens, A alternatives.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from lmjax.generate.cache import empty_cache, repeat_leading, repeat_rows
from lmjax.generate.model import Model
from lmjax.generate.prepared import decoding, whole
from lmjax.generate.sampling import Sampling, sample, truncated
from lmjax.mesh import BATCH_AXES
from lmjax.models.decoder import Decoder, Execution, GroupCache
from lmjax.nn.cache import CacheWrite

PREFILL_PART = 512
"""Columns of the prompts that are read at a time: their scores over the whole cache exist at once."""

NOTHING = -1
"""Where a row was finished before: no token."""

ROWS = PartitionSpec(BATCH_AXES)


class Found(NamedTuple):
    """The tokens that were chosen so far."""

    tokens_BN: Int[Array, "batch new"]
    logprobs_BN: Float[Array, "batch new"] | None
    """Of the model itself: before temperature and truncation."""
    best_BNA: Int[Array, "batch new alternatives"] | None
    """The most probable tokens in each place."""
    best_logprobs_BNA: Float[Array, "batch new alternatives"] | None


class State(NamedTuple):
    """What goes from one step of decoding to the next."""

    count: Int[Array, ""]
    """New tokens so far; the last of them is not in the cache yet."""
    column: Int[Array, ""]
    """Where that one will stand."""
    token_B: Int[Array, " batch"]
    done_B: Bool[Array, " batch"]
    found: Found
    first_B: Int[Array, " batch"]
    keys_B2: UInt32[Array, "batch 2"]
    cache: list[GroupCache]


class Steps(NamedTuple):
    """The model, and what the compiled programs need to know of it and of the tokenizer."""

    model: Model
    execution: Execution
    vocab_size: int
    end_ids: tuple[int, ...]
    """Tokens that end a text."""

    def start(
        self,
        params: Any,
        tokens_BP: Int[Array, "prompts prompt"],
        lengths_B: Int[Array, " prompts"],
        keys_B2: UInt32[Array, "batch 2"],
        sampling: Sampling,
        *,
        samples: int,
        max_new: int,
        logprobs: int | None,
        truncates: bool,
    ) -> tuple[State, Found, Bool[Array, " batch"]]:
        """The state after the first token of ``samples`` rows a prompt, and replicated: what was found, who is done.

        Row b is the last ``lengths[b]`` columns of ``tokens[b]``; a row of length 0 only fills up the batch.
        """
        decoder = self.model.decoder(params)
        P = tokens_BP.shape[1]
        hidden_BD, cache = prefill(decoder, self.execution, tokens_BP, lengths_B, P + max_new)
        if samples > 1:  # the prompt is read once
            cache = repeat_rows(cache, samples)
            hidden_BD, lengths_B = repeat_leading(hidden_BD, samples), repeat_leading(lengths_B, samples)
        B = hidden_BD.shape[0]

        def buffer(dtype, value, *shape):
            spec = PartitionSpec(BATCH_AXES, *(None,) * len(shape))
            return jnp.full((B, *shape), value, dtype, out_sharding=spec)

        reported = logprobs is not None
        found = Found(
            buffer(jnp.int32, NOTHING, max_new),
            buffer(jnp.float32, 0, max_new) if reported else None,
            buffer(jnp.int32, NOTHING, max_new, logprobs) if reported else None,
            buffer(jnp.float32, 0, max_new, logprobs) if reported else None,
        )
        zero = jnp.zeros((), jnp.int32)
        state = State(zero, zero + P - 1, lengths_B, lengths_B == 0, found, P - lengths_B, keys_B2, cache)
        return self._with_view(self._chosen(decoder, state, hidden_BD, sampling, truncates))

    def advance(
        self,
        params: Any,
        state: State,
        stopped_B: Bool[Array, " batch"],
        until: Int[Array, ""],
        sampling: Sampling,
        *,
        truncates: bool,
    ) -> tuple[State, Found, Bool[Array, " batch"]]:
        """Steps until there are ``until`` tokens, or all rows are done; ``stopped`` are done without an EOS.

        ``params`` are ``prepared``.
        """
        execution = decoding(params, self.execution)

        def go_on(state: State) -> jax.Array:
            return (state.count < until) & ~jnp.all(state.done_B)

        def step(state: State) -> State:
            decoder = self.model.decoder(whole(params))
            positions_B1 = (state.column - state.first_B)[:, None]
            write = CacheWrite(state.column, state.first_B, positions_B1[:, 0] + 1)
            hidden_B1D, cache = decoder.hidden_with_cache(
                state.token_B[:, None], positions_B1, execution, state.cache, write
            )
            return self._chosen(decoder, state._replace(cache=cache), hidden_B1D[:, 0], sampling, truncates)

        state = state._replace(done_B=state.done_B | stopped_B)
        return self._with_view(jax.lax.while_loop(go_on, step, state))

    def _chosen(self, decoder: Decoder, state: State, hidden_BD, sampling: Sampling, truncates: bool) -> State:
        """The state with one more token."""
        logits_BV = next_logits(decoder, hidden_BD, self.vocab_size)
        drawn_BV = truncated(logits_BV, sampling) if truncates else logits_BV
        token_B = sample(drawn_BV, state.keys_B2, state.count, sampling.temperature)
        new = Found(jnp.where(state.done_B, NOTHING, token_B), None, None, None)
        if state.found.best_BNA is not None:
            new = Found(new.tokens_BN, *_log_probabilities(logits_BV, token_B, state.found.best_BNA.shape[-1]))
        found = jax.tree.map(
            lambda row, value: jax.lax.dynamic_update_slice_in_dim(row, value[:, None], state.count, 1),
            state.found,
            new,
        )
        done_B = functools.reduce(jnp.logical_or, (token_B == end for end in self.end_ids), state.done_B)
        return state._replace(
            count=state.count + 1, column=state.column + 1, token_B=token_B, done_B=done_B, found=found
        )

    def _with_view(self, state: State) -> tuple[State, Found, Bool[Array, " batch"]]:
        found, done_B = jax.sharding.reshard((state.found, state.done_B), PartitionSpec())
        return state, found, done_B


def prefill(
    decoder: Decoder,
    execution: Execution,
    tokens_BP: Int[Array, "batch prompt"],
    lengths_B: Int[Array, " batch"],
    slots: int,
) -> tuple[Float[Array, "batch embed"], list[GroupCache]]:
    """The hidden state of each row's last token, and a cache that holds the prompts.

    Row b is the last ``lengths[b]`` columns of ``tokens[b]``; before them is padding, which nothing sees. P is a power
    of two.
    """
    B, P = tokens_BP.shape
    size = part_size(decoder, P)
    first_B = P - lengths_B

    def part(carry, start):
        _, cache = carry
        tokens_BC = jax.lax.dynamic_slice_in_dim(tokens_BP, start, size, 1)
        numbers_BC = jax.lax.broadcasted_iota(jnp.int32, (B, size), 1, out_sharding=PartitionSpec(BATCH_AXES, None))
        positions_BC = jnp.maximum(start + numbers_BC - first_B[:, None], -1)
        write = CacheWrite(start, first_B, lengths_B)
        hidden_BCD, cache = decoder.hidden_with_cache(tokens_BC, positions_BC, execution, cache, write)
        # A sum with one term: where the sequence is sharded, it needs no gather.
        last_BD = jnp.sum(jnp.where((numbers_BC == size - 1)[..., None], hidden_BCD, 0), axis=1)
        return (last_BD, cache), None

    width = decoder.config.embed_dim
    last_BD = jnp.zeros((B, width), execution.compute_dtype, out_sharding=PartitionSpec(BATCH_AXES, None))
    cache = empty_cache(decoder.config, B, slots, execution.compute_dtype, part=size)
    (last_BD, cache), _ = jax.lax.scan(part, (last_BD, cache), jnp.arange(0, P, size))
    return last_BD, cache


def part_size(decoder: Decoder, columns: int) -> int:
    """Columns of a part: a power of two, and about the smallest window at most, to whose slots it adds."""
    kinds = decoder.config.layer_pattern
    windows = [window for window in map(decoder.config.window, kinds) if window is not None]
    return min(columns, PREFILL_PART, *(1 << (window - 1).bit_length() for window in windows))


def next_logits(
    decoder: Decoder, hidden_BD: Float[Array, "batch embed"], vocab_size: int
) -> Float[Array, "batch vocab"]:
    """float32, each row whole on its device; -inf from ``vocab_size`` on."""
    logits_BV = decoder.logits(hidden_BD, PartitionSpec(BATCH_AXES, "tensor"))
    logits_BV = jax.sharding.reshard(logits_BV, PartitionSpec(BATCH_AXES, None))
    return jnp.where(jnp.arange(logits_BV.shape[1]) < vocab_size, logits_BV, -jnp.inf)


def _log_probabilities(logits_BV, token_B, alternatives: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the chosen tokens; the most probable tokens, and theirs."""

    def local(logits_BV, token_B):
        logprobs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
        best_logprobs_BA, best_BA = jax.lax.top_k(logprobs_BV, alternatives)
        chosen_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=-1)[:, 0]
        return chosen_B, best_BA.astype(jnp.int32), best_logprobs_BA

    table = PartitionSpec(BATCH_AXES, None)
    return jax.shard_map(local, in_specs=(table, ROWS), out_specs=(ROWS, table, table))(logits_BV, token_B)
