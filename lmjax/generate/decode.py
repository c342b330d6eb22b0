"""Continuing prompts: batches of them on the devices, and their text as it grows."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lmjax.data.tokenizer import Tokenizer
from lmjax.data.tokenizer_stream import incremental_decoder
from lmjax.errors import InputError
from lmjax.generate.model import Model, place, place_rows
from lmjax.generate.options import Options
from lmjax.generate.prepared import prepared
from lmjax.generate.sampling import Sampling, row_keys
from lmjax.generate.steps import NOTHING, Found, Steps
from lmjax.generate.text import TextStream
from lmjax.mesh import batch_shards
from lmjax.models.decoder import Execution
from lmjax.sharding import replicated

STEPS_PER_LOOK = 16
"""Tokens of each row between two looks for stop strings; those after one are thrown away."""

OnText = Callable[[int, int, str], None]
"""Called with the number of a prompt, of its sample, and a piece of text that follows the last one."""


class TokenLogprob(NamedTuple):
    """How probable the model finds a chosen token: natural logarithms, before temperature and truncation."""

    token: int
    logprob: float
    best: list[tuple[int, float]]
    """The most probable tokens in its place, with theirs."""


class Continuation(NamedTuple):
    """What a model made of one prompt."""

    text: str
    """Without the prompt, and cut before a stop string."""
    tokens: list[int]
    """Without the one that ended the text; up to the one that completed the stop string."""
    finish_reason: Literal["eos", "stop", "length"]
    """The model ended the text, a stop string did, or it was cut at the number of tokens asked for."""
    logprobs: list[TokenLogprob] | None
    """One a token, where asked for."""


class Generator:
    """Continues prompts on the mesh of a model, whose parameters are given each time.

    Compiled programs serve all numbers of tokens up to the same powers of two, and all temperatures and seeds.
    """

    def __init__(self, model: Model, execution: Execution, tokenizer: Tokenizer, end_ids: Iterable[int] = ()):
        """``end_ids`` are tokens that end a text, besides the tokenizer's EOS."""
        self._model = model
        self._tokenizer = tokenizer
        self._vocab_size = min(model.config.vocab_size, tokenizer.vocab_size)
        eos = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self._end_ids = frozenset((*eos, *end_ids))
        steps = Steps(model, execution, self._vocab_size, tuple(sorted(self._end_ids)))
        self._execution = execution
        self._start = jax.jit(steps.start, static_argnames=("samples", "max_new", "logprobs", "truncates"))
        self._advance = jax.jit(steps.advance, static_argnames="truncates", donate_argnums=1)

    def generate_texts(self, params: Any, prompts: Sequence[str], options: Options) -> list[str]:
        """The continuation of each prompt, without the prompt itself; errors as of ``generate``."""
        assert options.num_samples == 1
        found = self.generate(params, [self.encode(prompt) for prompt in prompts], options)
        return [continuation.text for (continuation,) in found]

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

    def check(self, prompts: Sequence[Sequence[int]], options: Options) -> None:
        """Raise the InputError that ``generate`` would raise for the same arguments."""
        options.check_vocabulary(self._vocab_size)
        longest = max(map(len, prompts), default=0)
        limit = self._model.config.max_length
        if longest + options.max_tokens > limit:
            raise InputError(
                f"a prompt of {longest} tokens and {options.max_tokens} new ones make {longest + options.max_tokens}, "
                f"but model.max_length is {limit}. Ask for at most {max(limit - longest, 0)} new tokens, or shorten "
                "the prompt."
            )

    def generate(
        self, params: Any, prompts: Sequence[Sequence[int]], options: Options, on_text: OnText | None = None
    ) -> list[list[Continuation]]:
        """The samples of each prompt (a list of at least one token), all in one batch.

        The random numbers of a sample depend on the seed, the prompt and the sample's number alone (the samples of a
        prompt that is given again go on counting), not on the mesh nor on the rows beside it. With several processes,
        all of them call this with the same arguments and get the same results. Raises InputError for a prompt that
        leaves no room in ``model.max_length``, and for options that the vocabulary is too small for.
        """
        return list(self.generate_batches(params, prompts, options, max(1, len(prompts)), on_text))

    def generate_batches(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        options: Options,
        batch_size: int,
        on_text: OnText | None = None,
    ) -> Iterator[list[Continuation]]:
        """The same for ``batch_size`` prompts at a time, each as soon as its batch is done. All are checked first."""
        self.check(prompts, options)
        samples = options.num_samples
        keys = row_keys(options.seed, [prompt for prompt in prompts for _ in range(samples)])

        def batches():
            for start in range(0, len(prompts), batch_size):
                batch = prompts[start : start + batch_size]
                own_keys = keys[start * samples : (start + len(batch)) * samples]
                yield from self._batch(params, batch, own_keys, options, start, on_text)

        return batches()

    def _batch(
        self, params, prompts, keys, options: Options, first: int, on_text: OnText | None
    ) -> list[list[Continuation]]:
        """The samples of some prompts, of which ``first`` precede."""
        mesh, samples = self._model.mesh, options.num_samples
        shards = batch_shards(mesh.shape)
        rows = -(-len(prompts) // shards) * shards
        tokens = np.zeros((rows, _power_of_two(max(map(len, prompts)))), np.int32)
        lengths = np.zeros(rows, np.int32)  # 0: a row that only fills up the batch
        for row, prompt in enumerate(prompts):
            tokens[row, tokens.shape[1] - len(prompt) :] = prompt
            lengths[row] = len(prompt)
        all_keys = np.zeros((rows * samples, 2), np.uint32)
        all_keys[: len(keys)] = keys
        numbers = Sampling.of(options, self._vocab_size)
        sampling = jax.tree.map(lambda number: place(number, replicated(mesh)), numbers)
        readers = [
            _Reader(self._text_stream(prompt, options), self._end_ids, on_text, (first + number, sample))
            for number, prompt in enumerate(prompts)
            for sample in range(samples)
        ]
        look = 1 if on_text is not None else STEPS_PER_LOOK if options.stop else options.max_tokens
        with jax.set_mesh(mesh):
            ready = prepared(params, self._execution, options.max_tokens)
            state, found, done = self._start(
                params,
                *(place_rows(value, mesh) for value in (tokens, lengths, all_keys)),
                sampling,
                samples=samples,
                max_new=_power_of_two(options.max_tokens),
                logprobs=options.logprobs,
                truncates=options.truncates,
            )
            for count in itertools.count(1, look):
                count = min(count, options.max_tokens)
                now = np.asarray(found.tokens_BN)
                for reader, row in zip(readers, now, strict=False):
                    reader.read(row[:count].tolist())
                stopped = np.zeros(rows * samples, bool)
                stopped[: len(readers)] = [reader.reason is not None for reader in readers]
                if count == options.max_tokens or np.all(stopped | np.asarray(done)):
                    break
                until = place(np.asarray(min(count + look, options.max_tokens), np.int32), replicated(mesh))
                del found
                state, found, done = self._advance(
                    ready, state, place_rows(stopped, mesh), until, sampling, truncates=options.truncates
                )
        on_host = jax.device_get(found)
        made = [reader.continuation(on_host, row) for row, reader in enumerate(readers)]
        return [made[start : start + samples] for start in range(0, len(made), samples)]

    def _text_stream(self, prompt: Sequence[int], options: Options) -> TextStream:
        return TextStream(incremental_decoder(self._tokenizer, prompt), options.stop)


class _Reader:
    """Follows one row: its tokens, its text, and why it ended."""

    def __init__(self, text: TextStream, end_ids: frozenset[int], on_text: OnText | None, number: tuple[int, int]):
        self._text, self._end_ids, self._on_text, self._number = text, end_ids, on_text, number
        self._tokens: list[int] = []
        self.reason: Literal["eos", "stop"] | None = None

    def read(self, row: list[int]) -> None:
        """Take the tokens of ``row`` that are new."""
        for token in row[len(self._tokens) :]:
            if self.reason is not None or token == NOTHING:
                break
            if token in self._end_ids:
                self.reason = "eos"
                self._tell(self._text.finish())
                break
            self._tokens.append(token)
            self._tell(self._text.feed(token))
            if self._text.stopped:
                self.reason = "stop"

    def continuation(self, found: Found, row: int) -> Continuation:
        self._tell(self._text.finish())
        logprobs = None
        if found.logprobs_BN is not None:
            assert found.best_BNA is not None
            assert found.best_logprobs_BNA is not None
            logprobs = []
            for number, token in enumerate(self._tokens):
                best, best_logprobs = found.best_BNA[row, number], found.best_logprobs_BNA[row, number]
                pairs = list(zip(best.tolist(), best_logprobs.tolist(), strict=True))
                logprobs.append(TokenLogprob(token, float(found.logprobs_BN[row, number]), pairs))
        reason = "stop" if self._text.stopped else self.reason or "length"
        return Continuation(self._text.text, self._tokens, reason, logprobs)

    def _tell(self, piece: str) -> None:
        if piece and self._on_text is not None:
            self._on_text(*self._number, piece)


def _power_of_two(number: int) -> int:
    """The first one that is not below ``number``."""
    return 1 << (number - 1).bit_length()
