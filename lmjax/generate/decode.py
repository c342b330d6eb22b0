"""Continuing prompts: a prefill of the cache, then one token a step, in one compiled program.

Legend: B batch, P positions of the longest prompt, C positions of a part of it, S slots of the cache, D embed, V vocab.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from lmjax.data.tokenizer import Tokenizer
from lmjax.errors import InputError
from lmjax.generate.cache import empty_cache
from lmjax.generate.model import Model, place, place_rows
from lmjax.generate.sampling import row_keys, sample
from lmjax.mesh import BATCH_AXES, batch_shards
from lmjax.models.decoder import Decoder, Execution, GroupCache
from lmjax.nn.cache import CacheWrite
from lmjax.sharding import replicated

PREFILL_PART = 512
"""Positions of the prompts that are read at a time: their scores over the whole cache exist at once."""

NOTHING = -1
"""Where a row was finished before: no token, no position."""


class Continuation(NamedTuple):
    """What a model made of one prompt."""

    tokens: list[int]
    """New tokens, without the end-of-sequence token."""
    finished: bool
    """Whether the model ended the text; otherwise it was cut at the number of tokens asked for."""


class Generator:
    """Continues prompts on the mesh of a model, whose parameters are given each time.

    A compiled program serves all numbers of tokens up to the same powers of two, and all temperatures and seeds.
    """

    def __init__(self, model: Model, execution: Execution, tokenizer: Tokenizer):
        self._model = model
        self._tokenizer = tokenizer
        self._run = jax.jit(
            functools.partial(
                _continue,
                model,
                execution,
                vocab_size=min(model.config.vocab_size, tokenizer.vocab_size),
                eos_id=NOTHING if tokenizer.eos_id is None else tokenizer.eos_id,
            ),
            static_argnames="max_new",
            out_shardings=replicated(model.mesh),
        )

    def generate_texts(
        self, params: Any, prompts: Sequence[str], *, max_tokens: int, temperature: float, seed: int
    ) -> list[str]:
        """The continuation of each prompt, without the prompt itself; arguments and errors as of ``generate``."""
        ids = [self.encode(prompt) for prompt in prompts]
        found = self.generate(params, ids, max_tokens=max_tokens, temperature=temperature, seed=seed)
        return [self.text(prompt, new.tokens) for prompt, new in zip(ids, found, strict=True)]

    def encode(self, prompt: str) -> list[int]:
        """The prompt as the beginning of a document: BOS, where the tokenizer has one, and the text."""
        bos = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        ids = bos + self._tokenizer.encode(prompt)
        if not ids:
            raise InputError(
                "a prompt is empty, and the tokenizer has no BOS token that a text could begin with. "
                "Give a prompt of at least one character."
            )
        return ids

    def text(self, prompt: Sequence[int], tokens: Sequence[int]) -> str:
        """What ``tokens`` add to the text of ``prompt``: alone they might lose the space that they begin with."""
        return self._tokenizer.decode([*prompt, *tokens])[len(self._tokenizer.decode(prompt)) :]

    def generate(
        self, params: Any, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float, seed: int
    ) -> list[Continuation]:
        """Up to ``max_tokens`` new tokens for each prompt (a list of at least one token).

        ``temperature`` 0 takes the most probable token. The random numbers of a row depend on the seed and the prompt
        alone (for its k-th copy among ``prompts``, on k), not on the mesh nor on the rows beside it. With several
        processes, all of them call this with the same arguments and get the same results. Raises InputError for a
        prompt that leaves no room in ``model.max_length``.
        """
        self.check(prompts, max_tokens, temperature)
        if not prompts:
            return []
        mesh = self._model.mesh
        shards = batch_shards(mesh.shape)
        rows = -(-len(prompts) // shards) * shards
        tokens = np.zeros((rows, _power_of_two(max(map(len, prompts)))), np.int32)
        lengths = np.zeros(rows, np.int32)  # 0: a row that only fills up the batch
        keys = np.zeros((rows, 2), np.uint32)
        keys[: len(prompts)] = row_keys(seed, prompts)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
            lengths[row] = len(prompt)
        with jax.set_mesh(mesh):
            new_BN = self._run(
                params,
                *(place_rows(value, mesh) for value in (tokens, lengths, keys)),
                place(np.asarray(temperature, np.float32), replicated(mesh)),
                place(np.asarray(max_tokens, np.int32), replicated(mesh)),
                max_new=_power_of_two(max_tokens),
            )
        return [self._read(row[:max_tokens].tolist()) for row in np.asarray(new_BN)[: len(prompts)]]

    def check(self, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float) -> None:
        """Raise the InputError that ``generate`` would raise for the same arguments."""
        if max_tokens < 1:
            raise InputError(f"the number of new tokens is {max_tokens}; ask for 1 or more")
        if not 0 <= temperature < float("inf"):
            raise InputError(f"temperature is {temperature}; it has to be 0 (the most probable token) or above")
        longest = max(map(len, prompts), default=0)
        limit = self._model.config.max_length
        if longest + max_tokens > limit:
            raise InputError(
                f"a prompt of {longest} tokens and {max_tokens} new ones make {longest + max_tokens}, but "
                f"model.max_length is {limit}. Ask for at most {max(limit - longest, 0)} new tokens, or shorten the "
                "prompt."
            )

    def _read(self, row: list[int]) -> Continuation:
        ends = [row.index(token) for token in (self._tokenizer.eos_id, NOTHING) if token in row]
        return Continuation(row[: min(ends)] if ends else row, bool(ends))


class _State(NamedTuple):
    """What goes from one step of decoding to the next."""

    count: Int[Array, ""]
    """New tokens so far."""
    token_B: Int[Array, " batch"]
    """The last of them."""
    done_B: Array
    """Whether a row has ended."""
    new_BN: Int[Array, "batch new"]
    key_positions_BS: Int[Array, "batch slots"]
    cache: list[GroupCache]


def _continue(
    model: Model,
    execution: Execution,
    params: Any,
    tokens_BP: Int[Array, "batch prompt"],
    lengths_B: Int[Array, " batch"],
    keys_B2: UInt32[Array, "batch 2"],
    temperature: Float[Array, ""],
    max_tokens: Int[Array, ""],
    *,
    max_new: int,
    vocab_size: int,
    eos_id: int,
) -> Int[Array, "batch new"]:
    """(batch, max_new) tokens, of which ``max_tokens`` are asked for; NOTHING after the end of a text."""
    decoder = model.decoder(params)
    B, P = tokens_BP.shape
    rows = PartitionSpec(BATCH_AXES, None)

    def choose(hidden_BD, count):
        return sample(next_logits(decoder, hidden_BD, vocab_size), keys_B2, count, temperature)

    def go_on(state: _State) -> jax.Array:
        return (state.count < max_tokens) & ~jnp.all(state.done_B)

    def step(state: _State) -> _State:
        slot = P + state.count - 1
        positions_B1 = jnp.where(state.done_B, NOTHING, lengths_B + state.count - 1)[:, None]
        key_positions_BS = jax.lax.dynamic_update_slice_in_dim(state.key_positions_BS, positions_B1, slot, 1)
        hidden_B1D, cache = decoder.hidden_with_cache(
            state.token_B[:, None], positions_B1, execution, state.cache, CacheWrite(slot, key_positions_BS)
        )
        token_B = choose(hidden_B1D[:, 0], state.count)
        new_B1 = jnp.where(state.done_B, NOTHING, token_B)[:, None]
        new_BN = jax.lax.dynamic_update_slice_in_dim(state.new_BN, new_B1, state.count, 1)
        done_B = state.done_B | (token_B == eos_id)
        return _State(state.count + 1, token_B, done_B, new_BN, key_positions_BS, cache)

    hidden_BD, cache, key_positions_BS = prefill(decoder, execution, tokens_BP, lengths_B, P + max_new)
    count = jnp.zeros((), jnp.int32)
    token_B = choose(hidden_BD, count)
    new_BN = jnp.full((B, max_new), NOTHING, jnp.int32, out_sharding=rows).at[:, 0].set(token_B)
    done_B = (token_B == eos_id) | (lengths_B == 0)
    return jax.lax.while_loop(go_on, step, _State(count + 1, token_B, done_B, new_BN, key_positions_BS, cache)).new_BN


def prefill(
    decoder: Decoder,
    execution: Execution,
    tokens_BP: Int[Array, "batch prompt"],
    lengths_B: Int[Array, " batch"],
    slots: int,
) -> tuple[Float[Array, "batch embed"], list[GroupCache], Int[Array, "batch slots"]]:
    """The hidden state of each row's last token, a cache that holds the prompts, and the positions in its slots.

    Row b is ``tokens[b, :lengths[b]]``; the rest of it is padding, which nothing sees. P is a power of two.
    """
    B, P = tokens_BP.shape
    rows = PartitionSpec(BATCH_AXES, None)
    numbers_BP = jax.lax.broadcasted_iota(jnp.int32, (B, P), 1, out_sharding=rows)
    positions_BP = jnp.where(numbers_BP < lengths_B[:, None], numbers_BP, NOTHING)
    # The slots of later parts are hidden from earlier ones by their positions, so they may be named at once.
    empty = jnp.full((B, slots - P), NOTHING, jnp.int32, out_sharding=rows)
    key_positions_BS = jnp.concatenate([positions_BP, empty], axis=1)
    size = min(P, PREFILL_PART)

    def part(carry, start):
        last_BD, cache = carry
        tokens_BC = jax.lax.dynamic_slice_in_dim(tokens_BP, start, size, 1)
        positions_BC = jax.lax.dynamic_slice_in_dim(positions_BP, start, size, 1)
        write = CacheWrite(start, key_positions_BS)
        hidden_BCD, cache = decoder.hidden_with_cache(tokens_BC, positions_BC, execution, cache, write)
        is_last_BC = positions_BC == lengths_B[:, None] - 1
        is_last_BC &= positions_BC != NOTHING
        # A sum with one term: where the sequence is sharded, it needs no gather.
        last_BD += jnp.sum(jnp.where(is_last_BC[..., None], hidden_BCD, 0), axis=1)
        return (last_BD, cache), None

    last_BD = jnp.zeros((B, decoder.config.embed_dim), execution.compute_dtype, out_sharding=rows)
    cache = empty_cache(decoder.config, B, slots, execution.compute_dtype)
    (last_BD, cache), _ = jax.lax.scan(part, (last_BD, cache), jnp.arange(0, P, size))
    return last_BD, cache, key_positions_BS


def next_logits(
    decoder: Decoder, hidden_BD: Float[Array, "batch embed"], vocab_size: int
) -> Float[Array, "batch vocab"]:
    """float32, each row whole on its device; -inf from ``vocab_size`` on."""
    table_VD = decoder.head_table.astype(hidden_BD.dtype)
    logits_BV = jnp.einsum(
        "bd,vd->bv",
        hidden_BD,
        table_VD,
        preferred_element_type=jnp.float32,
        out_sharding=PartitionSpec(BATCH_AXES, "tensor"),
    )
    logits_BV = jax.sharding.reshard(logits_BV, PartitionSpec(BATCH_AXES, None))
    return jnp.where(jnp.arange(table_VD.shape[0]) < vocab_size, logits_BV, -jnp.inf)


def _power_of_two(number: int) -> int:
    """The first one that is not below ``number``."""
    return 1 << (number - 1).bit_length()
