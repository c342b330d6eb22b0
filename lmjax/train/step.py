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
from lmjax.ops.routing import RouterSums
from lmjax.train.router import router_loss, with_moved_biases, zero_sums
from lmjax.train.state import Blueprint, TrainState, fetched, put_away


class DeviceBatch(NamedTuple):
    """A global batch on the devices; fields as in ``lmjax.data.batches.Batch``."""

    tokens: Int[Array, "A B T"]
    targets: Int[Array, "A B T"]
    segment_ids: Int[Array, "A B T"]
    positions: Int[Array, "A B T"]
    weights: Float[Array, "A B T"]


class StepMetrics(NamedTuple):
    """What a step tells, as float32 arrays on the devices: scalars, but for the routers."""

    loss: Any
    """Mean negative log-likelihood of the weighted targets, in nats."""
    grad_norm: Any
    """Global norm of the gradient before clipping."""
    learning_rate: Any
    tokens: Any
    """Sum of the target weights."""
    router: RouterSums | None
    """Of the whole global batch, for each block with experts; None where there is none."""


def loss_sums(
    decoder: Decoder,
    batch: DeviceBatch,
    execution: Execution,
    options: LossOptions,
    noise_keys_B: PRNGKeyArray | None = None,
) -> tuple[LossSums, RouterSums | None]:
    """The loss over one micro-batch (no leading dimension), summed over its weighted targets; and what the routers did.

    The decoder's dropout and jitter are applied where ``noise_keys`` (one a row) are given.
    """
    hidden_BTD, router = decoder.hidden_and_router(
        batch.tokens, batch.positions, batch.segment_ids, execution, noise_keys_B=noise_keys_B
    )
    with jax.named_scope("loss"):
        sums = linear_cross_entropy(
            hidden_BTD,
            decoder.head_table,
            batch.targets,
            batch.weights,
            options,
            **decoder.head_arguments,
        )
    return sums, router


def make_step(
    blueprint: Blueprint, execution: Execution, options: LossOptions, seed: int = 0
) -> Callable[[TrainState, DeviceBatch], tuple[TrainState, StepMetrics]]:
    """One update, a pure function to be jitted with its state donated.

    The loss is the mean over the weighted targets of the whole global batch, so micro-batches with unequal numbers of
    them add up to the gradient of the one large batch; the routers' losses are means over its tokens. Dropout and
    jitter are drawn from ``seed``, the step and a row's place in the global batch.
    """
    moe = blueprint.config.moe

    def gradients(params, batch: DeviceBatch, noise_keys_B, total_weight, num_tokens):
        def loss(params):
            sums, router = loss_sums(blueprint.decoder(params), batch, execution, options, noise_keys_B)
            total = sums.loss / total_weight
            if moe is not None and router is not None:
                total += router_loss(moe, router, num_tokens)
            return total, (sums.nll, router)

        (_, told), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return told, grads

    def step(state: TrainState, batch: DeviceBatch) -> tuple[TrainState, StepMetrics]:
        total_weight = jnp.maximum(jnp.sum(batch.weights), 1.0)
        num_tokens = jnp.maximum(jnp.sum(batch.segment_ids > 0, dtype=jnp.float32), 1.0)
        keys_AB = None
        if blueprint.config.dropout or (moe is not None and moe.jitter):
            keys_AB = row_keys(jax.random.fold_in(jax.random.key(seed), state.step), *batch.tokens.shape[:2])
        if batch.tokens.shape[0] == 1:
            first, keys_B = jax.tree.map(lambda leaf: leaf[0], (batch, keys_AB))
            (nll, router), grads = gradients(state.params, first, keys_B, total_weight, num_tokens)
        else:

            def accumulate(carry, part):
                micro_batch, keys_B = part
                found = gradients(state.params, micro_batch, keys_B, total_weight, num_tokens)
                return jax.tree.map(jnp.add, carry, found), None

            told = (jnp.zeros((), jnp.float32), None if moe is None else zero_sums(moe, blueprint.config.blocks))
            zeros = (told, jax.tree.map(jnp.zeros_like, state.params))
            ((nll, router), grads), _ = jax.lax.scan(accumulate, zeros, (batch, keys_AB))
        with jax.named_scope("optimizer"):
            moments = fetched(blueprint, state.opt_state)
            updates, moments = blueprint.optimizer.update(grads, moments, state.params)
            opt_state = put_away(blueprint, moments)
            params = optax.apply_updates(state.params, updates)
            if moe is not None and router is not None and moe.choice_bias_rate is not None:
                params = with_moved_biases(params, blueprint.config, router, moe.choice_bias_rate)
            metrics = StepMetrics(
                loss=nll / total_weight,
                grad_norm=optax.tree.norm(grads),
                learning_rate=jnp.asarray(blueprint.schedule(state.step), jnp.float32),
                tokens=jnp.sum(batch.weights),
                router=router,
            )
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def lower_step(
    blueprint: Blueprint, execution: Execution, options: LossOptions, batch: DeviceBatch, seed: int = 0
) -> jax.stages.Lowered:
    """What ``make_step`` gives, traced for batches of the shapes of ``batch``; the mesh's devices need not be here."""
    platform = execution.hardware.platform
    step = jax.jit(make_step(blueprint, execution, options, seed), donate_argnums=0)
    with jax.set_mesh(blueprint.mesh):
        traced = step.trace(blueprint.state, batch)
        return traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,))


def row_keys(key: PRNGKeyArray, num_micro_batches: int, num_rows: int) -> PRNGKeyArray:
    """(A, B) keys, one a row: row b of micro-batch a is row b A + a of the global batch."""
    places_AB = jnp.arange(num_micro_batches)[:, None] + num_micro_batches * jnp.arange(num_rows)
    places_AB = jax.sharding.reshard(places_AB, PartitionSpec(None, BATCH_AXES))
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (None, 0))(key, places_AB)
