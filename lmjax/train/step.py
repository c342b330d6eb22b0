"""Everything that happens in a step.

Legend: A micro-batches, B rows of a micro-batch, T positions, D embed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lmjax.models.decoder import Decoder, Execution
from lmjax.ops.cross_entropy import LossOptions, LossSums, linear_cross_entropy
from lmjax.train.state import Blueprint, TrainState


class DeviceBatch(NamedTuple):
    """A global batch on the devices; fields as in ``lmjax.data.batches.Batch``."""

    tokens: Int[Array, "A B T"]
    targets: Int[Array, "A B T"]
    segment_ids: Int[Array, "A B T"]
    positions: Int[Array, "A B T"]
    weights: Float[Array, "A B T"]


class StepMetrics(NamedTuple):
    """What a step tells, as float32 scalars on the devices."""

    loss: Any
    """Mean negative log-likelihood of the weighted targets, in nats."""
    grad_norm: Any
    """Global norm of the gradient before clipping."""
    learning_rate: Any
    tokens: Any
    """Sum of the target weights."""


def loss_sums(decoder: Decoder, batch: DeviceBatch, execution: Execution, options: LossOptions) -> LossSums:
    """The loss over one micro-batch (no leading dimension), summed over its weighted targets."""
    hidden_BTD = decoder.hidden(batch.tokens, batch.positions, batch.segment_ids, execution)
    with jax.named_scope("loss"):
        return linear_cross_entropy(
            hidden_BTD,
            decoder.head_table,
            batch.targets,
            batch.weights,
            options,
            vocab_size=decoder.config.vocab_size,
        )


def make_step(
    blueprint: Blueprint, execution: Execution, options: LossOptions
) -> Callable[[TrainState, DeviceBatch], tuple[TrainState, StepMetrics]]:
    """One update, a pure function to be jitted with its state donated.

    The loss is the mean over the weighted targets of the whole global batch, so micro-batches with unequal numbers of
    them add up to the gradient of the one large batch.
    """

    def gradients(params, batch: DeviceBatch, total_weight):
        def loss(params):
            sums = loss_sums(blueprint.decoder(params), batch, execution, options)
            return sums.loss / total_weight, sums.nll

        (_, nll), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return nll, grads

    def step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, StepMetrics]:
        total_weight = jnp.maximum(jnp.sum(batch.weights), 1.0)
        if batch.tokens.shape[0] == 1:
            nll, grads = gradients(state.params, jax.tree.map(lambda leaf: leaf[0], batch), total_weight)
        else:

            def accumulate(carry, micro_batch):
                return jax.tree.map(jnp.add, carry, gradients(state.params, micro_batch, total_weight)), None

            zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params))
            (nll, grads), _ = jax.lax.scan(accumulate, zeros, batch)
        with jax.named_scope("optimizer"):
            updates, opt_state = blueprint.optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            metrics = StepMetrics(
                loss=nll / total_weight,
                grad_norm=optax.tree.norm(grads),
                learning_rate=jnp.asarray(blueprint.schedule(state.step), jnp.float32),
                tokens=jnp.sum(batch.weights),
            )
        return TrainState(state.step + 1, params, opt_state), metrics

    return step
