"""A toy tokenizer, a small decoder of every kind of layer, and its logits without a cache."""

from typing import Any

import jax
import numpy as np

from lmjax.data.tokenizer import ByteTokenizer
from lmjax.train.state import Blueprint
from tests import tiny

CONFIG = tiny.with_changes(
    tiny.CONFIG, num_kv_heads=2, num_layers=3, layer_pattern=("sliding", "full"), sliding_window=3, max_length=32
)
"""Two segments: one of a pattern, and the layer that is left; K/V heads that a tensor axis of 8 does not divide."""


class Letters(ByteTokenizer):
    """a to z are the tokens 3 to 28; a text begins with 1 and ends with 2."""

    vocab_size = CONFIG.vocab_size
    bos_id: int | None = 1
    eos_id: int | None = 2
    pad_id: int | None = None

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") + 3 for letter in text]

    def decode(self, ids) -> str:
        return "".join(chr(token - 3 + ord("a")) for token in ids if token > 2)


def parameters(blueprint: Blueprint, rng: np.random.Generator) -> tuple[Any, Any]:
    """Random parameters as numpy arrays and on the mesh."""
    params = tiny.random_params(blueprint, rng)
    return params, tiny.state_of(blueprint, params).params


class Uncached:
    """Logits of whole rows, each computed from the beginning."""

    def __init__(self, blueprint: Blueprint, params: Any):
        self._blueprint, self._params = blueprint, params
        self._hidden = jax.jit(
            lambda params, tokens, positions: blueprint.decoder(params).hidden(tokens, positions, None, tiny.FLOAT32)
        )

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """(rows, length) to (rows, length, vocab)."""
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        with jax.set_mesh(self._blueprint.mesh):
            inputs = tiny.by_rows(self._blueprint.mesh, tokens.astype(np.int32), positions)
            hidden = np.asarray(self._hidden(self._params, *inputs))
        config = self._blueprint.config
        table = self._params["embed" if config.tie_embeddings else "head"]["table"]
        return hidden @ np.asarray(table)[: config.vocab_size].T


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
