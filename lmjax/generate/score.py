"""The exact likelihood of a document: every token but the first is scored once.

Legend: B windows of a batch, T positions.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.data.tokenizer import Tokenizer
from lmjax.errors import InputError
from lmjax.generate.model import Model, place_rows
from lmjax.mesh import batch_shards
from lmjax.models.decoder import Execution
from lmjax.ops.cross_entropy import LossOptions, token_nll
from lmjax.sharding import replicated

POSITIONS_AT_ONCE = 8192
"""Positions of a device in a forward pass; a longer window is taken alone."""


class Score(NamedTuple):
    """How likely a model finds a document."""

    nll: float
    """Negative log-likelihood of the scored tokens, summed, in nats."""
    tokens: int
    """Scored tokens."""

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood, at most e^700."""
        return math.exp(min(self.nll / self.tokens, 700.0))


class Window(NamedTuple):
    """The inputs ``start`` to ``stop`` of a document, of which those from ``first`` on are scored.

    Input i is the token whose next one, i + 1, is the target.
    """

    start: int
    first: int
    stop: int


def windows(num_targets: int, length: int, stride: int) -> list[Window]:
    """Windows of at most ``length`` inputs that score each of ``num_targets`` targets once.

    One window where all of them fit. Otherwise the first is full and scores everything in it, and each further one ends
    up to ``stride`` inputs later and scores those alone, so that a target has at least length - stride + 1 tokens of
    context: with stride 1 the longest possible, length.
    """
    found = [Window(0, 0, min(num_targets, length))]
    while found[-1].stop < num_targets:
        first = found[-1].stop
        stop = min(first + stride, num_targets)
        found.append(Window(stop - length, first, stop))
    return found


def document_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """``text`` as one document, with the BOS of a tokenizer that has one and without EOS: the text may go on."""
    return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)


class Scorer:
    """Scores documents on the mesh of a model, whose parameters are given each time."""

    def __init__(self, model: Model, execution: Execution):
        self._model = model
        self._nll = jax.jit(functools.partial(_nll, model, execution), out_shardings=replicated(model.mesh))

    def score(self, params: Any, tokens: Sequence[int], *, stride: int | None = None) -> Score:
        """The likelihood of ``tokens[1:]``, each given what precedes it, as far as ``model.max_length`` inputs reach.

        A document that is longer is read in windows that advance by ``stride`` tokens (half of max_length by default);
        1 gives every token the longest possible context, at the price of a forward pass for each. With several
        processes, all of them call this with the same arguments. Raises InputError where there is nothing to score.
        """
        limit, mesh = self._model.config.max_length, self._model.mesh
        stride = max(1, limit // 2) if stride is None else stride
        if not 1 <= stride <= limit:
            raise InputError(f"stride is {stride}; windows advance by 1 to model.max_length = {limit} tokens")
        if len(tokens) < 2:
            raise InputError(
                f"the document has {len(tokens)} token(s), and the first is not scored. Give a text of at least two."
            )
        document = np.asarray(tokens, np.int32)
        parts = windows(len(tokens) - 1, limit, stride)
        shards = batch_shards(mesh.shape)
        length = min(limit, 1 << (parts[0].stop - 1).bit_length())
        rows = shards * min(max(1, POSITIONS_AT_ONCE // length), -(-len(parts) // shards))
        total = 0.0  # on the host in float64: float32 would drop the tail of a long document
        with jax.set_mesh(mesh):
            for start in range(0, len(parts), rows):
                inputs, targets, segment_ids, scored = _rows(document, parts[start : start + rows], rows, length)
                placed = (place_rows(value, mesh) for value in (inputs, targets, segment_ids))
                total += float(np.asarray(self._nll(params, *placed), np.float64)[scored].sum())
        return Score(total, len(tokens) - 1)


def _rows(document: np.ndarray, parts: list[Window], rows: int, length: int) -> tuple[np.ndarray, ...]:
    """Inputs, targets, segment ids (1, or 0 at padding) and which targets are scored, each (rows, length)."""
    inputs, targets, segment_ids = (np.zeros((rows, length), np.int32) for _ in range(3))
    scored = np.zeros((rows, length), bool)
    for row, (start, first, stop) in enumerate(parts):
        inputs[row, : stop - start] = document[start:stop]
        targets[row, : stop - start] = document[start + 1 : stop + 1]
        segment_ids[row, : stop - start] = 1
        scored[row, first - start : stop - start] = True
    return inputs, targets, segment_ids, scored


def _nll(model: Model, execution: Execution, params: Any, inputs_BT, targets_BT, segment_ids_BT) -> jax.Array:
    """-log p of each target, float32."""
    decoder = model.decoder(params)
    positions_BT = jax.lax.broadcasted_iota(
        jnp.int32, inputs_BT.shape, 1, out_sharding=jax.typeof(inputs_BT).sharding.spec
    )
    hidden_BTD = decoder.hidden(inputs_BT, positions_BT, segment_ids_BT, execution)
    return token_nll(hidden_BTD, decoder.head_table, targets_BT, LossOptions(), **decoder.head_arguments)
