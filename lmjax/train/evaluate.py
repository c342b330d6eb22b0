"""The loss on the held-out rows."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lmjax.models.decoder import Execution
from lmjax.ops.cross_entropy import LossOptions
from lmjax.sharding import replicated
from lmjax.train.state import Blueprint
from lmjax.train.step import DeviceBatch, loss_sums


class Evaluation(NamedTuple):
    """Means over the weighted targets of the scored rows, in nats."""

    eval_loss: float
    perplexity: float
    unigram_loss: float
    """What the token frequencies of the training split (add-one smoothed) give on the same targets."""
    tokens: int


def unigram_log_probs(token_counts: Sequence[int]) -> np.ndarray:
    """log((count + 1) / (total + vocab)), float32 (vocab,); vocab is that of the tokenizer, one count a token."""
    counts = np.asarray(token_counts, np.float64) + 1
    return np.log(counts / counts.sum()).astype(np.float32)


def make_evaluator(
    blueprint: Blueprint, execution: Execution, options: LossOptions, token_counts: Sequence[int]
) -> Callable[[Any, Iterator[DeviceBatch]], Evaluation]:
    """A function of (params, batches) that scores every batch; each has one micro-batch."""
    log_probs = jax.device_put(unigram_log_probs(token_counts), replicated(blueprint.mesh))

    @jax.jit
    def sums(params, batch: DeviceBatch, log_probs):
        batch = jax.tree.map(lambda leaf: leaf[0], batch)
        model, _ = loss_sums(blueprint.decoder(params), batch, execution, options)
        spec = jax.typeof(batch.targets).sharding.spec
        unigram = log_probs.at[batch.targets].get(out_sharding=PartitionSpec(*spec))
        return jnp.stack([model.nll, -jnp.sum(batch.weights * unigram), jnp.sum(batch.weights)])

    def evaluate(params: Any, batches: Iterator[DeviceBatch]) -> Evaluation:
        with jax.set_mesh(blueprint.mesh):
            # Summed on the host in float64: float32 would drop the tail of a long split.
            total = sum((np.asarray(sums(params, batch, log_probs), np.float64) for batch in batches), np.zeros(3))
        nll, unigram, weight = total.tolist()
        loss = nll / weight
        return Evaluation(loss, math.exp(min(loss, 700.0)), unigram / weight, round(weight))

    return evaluate
