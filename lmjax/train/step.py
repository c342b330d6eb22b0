"""Everything that happens in a step.

Legend: A micro-batches, B rows of a micro-batch, T positions, D embed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lmjax.mesh import BATCH_AXES
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


def loss_sums(
    decoder: Decoder,
    batch: DeviceBatch,
    execution: Execution,
    options: LossOptions,
    dropout_keys_B: PRNGKeyArray | None = None,
) -> LossSums:
    """The loss over one micro-batch (no leading dimension), summed over its weighted targets.

    The decoder's dropout is applied where ``dropout_keys`` (one a row) are given.
    """
    hidden_BTD = decoder.hidden(
        batch.tokens, batch.positions, batch.segment_ids, execution, dropout_keys_B=dropout_keys_B
    )
    with jax.named_scope("loss"):
        return linear_cross_entropy(
            hidden_BTD,
            decoder.head_table,
            batch.targets,
            batch.weights,
            options,
            **decoder.head_arguments,
        )


def make_step(
    blueprint: Blueprint, execution: Execution, options: LossOptions, seed: int = 0
) -> Callable[[TrainState, DeviceBatch], tuple[TrainState, StepMetrics]]:
    """One update, a pure function to be jitted with its state donated.

    The loss is the mean over the weighted targets of the whole global batch, so micro-batches with unequal numbers of
    them add up to the gradient of the one large batch. Dropout is drawn from ``seed``, the step and a row's place in
    the global batch.
    """

    def gradients(params, batch: DeviceBatch, dropout_keys_B, total_weight):
        def loss(params):
            sums = loss_sums(blueprint.decoder(params), batch, execution, options, dropout_keys_B)
            return sums.loss / total_weight, sums.nll

        (_, nll), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return nll, grads

    def step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, StepMetrics]:
        total_weight = jnp.maximum(jnp.sum(batch.weights), 1.0)
        keys_AB = None
        if blueprint.config.dropout:
            keys_AB = row_keys(jax.random.fold_in(jax.random.key(seed), state.step), *batch.tokens.shape[:2])
        if batch.tokens.shape[0] == 1:
            first, keys_B = jax.tree.map(lambda leaf: leaf[0], (batch, keys_AB))
            nll, grads = gradients(state.params, first, keys_B, total_weight)
        else:

            def accumulate(carry, part):
                micro_batch, keys_B = part
                return jax.tree.map(jnp.add, carry, gradients(state.params, micro_batch, keys_B, total_weight)), None

            zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.params))
            (nll, grads), _ = jax.lax.scan(accumulate, zeros, (batch, keys_AB))
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


def row_keys(key: PRNGKeyArray, num_micro_batches: int, num_rows: int) -> PRNGKeyArray:
    """(A, B) keys, one a row: row b of micro-batch a is row b A + a of the global batch."""
    places_AB = jnp.arange(num_micro_batches)[:, None] + num_micro_batches * jnp.arange(num_rows)
    places_AB = jax.sharding.reshard(places_AB, PartitionSpec(None, BATCH_AXES))
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))(key, places_AB)
