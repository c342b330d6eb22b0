"""A layer of experts over the mesh: routing, dispatch, the experts' products, and what comes back.

Legend: B batch, T positions, D embed, E experts, F hidden of an expert, K choices, N tokens of a device, M rows.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lmjax.mesh import BATCH_AXES
from lmjax.ops.expert_dispatch import capacity_of, dropless, from_experts, to_experts, with_capacity
from lmjax.ops.grouped_matmul import grouped_matmul, varying_together
from lmjax.ops.routing import RouterOptions, RouterSums, route, router_sums
from lmjax.sharding import activation_spec, parameter_spec


class ExpertParams(NamedTuple):
    """The float32 parameters of a layer of experts, each sharded as its axes (``EXPERT_AXES``) say."""

    router: Float[Array, "embed experts"]
    choice_bias: Float[Array, " experts"] | None
    gate: Float[Array, "experts embed hidden"] | None
    up: Float[Array, "experts embed hidden"]
    down: Float[Array, "experts hidden embed"]


EXPERT_AXES: Mapping[str, tuple[str, ...]] = {
    "router": ("embed", "router_experts"),
    "choice_bias": ("router_experts",),
    "gate": ("experts", "embed", "expert_mlp"),
    "up": ("experts", "embed", "expert_mlp"),
    "down": ("experts", "expert_mlp", "embed"),
}
"""The logical axes of every parameter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """What a layer of experts does."""

    router: RouterOptions
    activation: Callable[[jax.Array], jax.Array]
    capacity_factor: float | None
    """Slots of an expert in a sequence, as a multiple of its even share; None drops no choice."""
    jitter: float
    """The router's input is multiplied by numbers between 1 - jitter and 1 + jitter where there are keys (Switch)."""
    platform: str
    """cpu, gpu or tpu."""
    reduce_f32: bool
    """Whether devices sum the gradients of matrices in float32, at twice the bytes, or in the dtype of x."""
    tag: Callable[[jax.Array, str], jax.Array]
    """Names a value for ``jax.checkpoint`` policies."""


def expert_mlp(
    x_BTD: Float[Array, "batch seq embed"],
    valid_BT: Bool[Array, "batch seq"],
    params: ExpertParams,
    options: ExpertOptions,
    keys_B: PRNGKeyArray | None,
) -> tuple[Float[Array, "batch seq embed"], RouterSums]:
    """The sum over each token's experts of weight x down(act(gate(x)) * up(x)), and what the router did.

    ``x`` has every sequence whole on its device; the result is sharded as the residual stream. Tokens that are not
    valid go to no expert and get zeros. ``keys``, one a row, are for jitter.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    x_spec = activation_spec(("batch", "seq", "embed"), x_BTD.shape)
    y_spec = activation_spec(("batch", "seq_residual", "embed"), x_BTD.shape)
    rows_spec = activation_spec(("batch",), x_BTD.shape[:1])
    param_specs = ExpertParams._make(
        None if param is None else parameter_spec(EXPERT_AXES[name], param.shape, sizes)
        for name, param in params._asdict().items()
    )

    def local(x_BTD, valid_BT, params: ExpertParams, keys_B):
        x_BTD, valid_BT = varying_together(x_BTD, valid_BT)
        logits_BTE = _router_logits(x_BTD, params.router, options, keys_B)
        routing = route(logits_BTE, params.choice_bias, options.router)
        num_experts = options.router.num_experts
        if options.capacity_factor is None:
            dispatch = dropless(routing.experts, valid_BT, num_experts)
        else:
            capacity = capacity_of(
                x_BTD.shape[1], num_experts, options.router.experts_per_token, options.capacity_factor
            )
            dispatch = with_capacity(routing.experts, valid_BT, num_experts, capacity)
        sums = router_sums(logits_BTE, routing, dispatch.kept, valid_BT, options.router, BATCH_AXES)
        rows_MD = to_experts(x_BTD.reshape(-1, x_BTD.shape[2]), dispatch)
        rows_MD = _experts(rows_MD, dispatch.sizes, params, options)
        weights_NK = routing.weights.reshape(dispatch.row_of_choice.shape)
        y_BTD = from_experts(rows_MD, weights_NK, dispatch).reshape(x_BTD.shape)
        if y_spec[1] is None:
            return jax.lax.psum(y_BTD, "tensor"), sums
        return jax.lax.psum_scatter(y_BTD, "tensor", scatter_dimension=1, tiled=True), sums

    in_specs = (x_spec, activation_spec(("batch", "seq"), valid_BT.shape), param_specs, rows_spec)
    sums_specs = RouterSums._make(jax.sharding.PartitionSpec() for _ in RouterSums._fields)
    if keys_B is None:
        in_specs = (*in_specs[:3], None)
    return jax.shard_map(local, in_specs=in_specs, out_specs=(y_spec, sums_specs))(x_BTD, valid_BT, params, keys_B)


def _router_logits(x_BTD, router_DE, options: ExpertOptions, keys_B) -> Float[Array, "batch seq experts"]:
    """In float32 throughout: a small error in a logit changes which expert is chosen (Switch, section 2.4)."""
    x_BTD = x_BTD.astype(jnp.float32)
    if options.jitter and keys_B is not None:
        draw = lambda key: jax.random.uniform(key, x_BTD.shape[1:], minval=-options.jitter, maxval=options.jitter)  # noqa: E731
        x_BTD = x_BTD * (1 + jax.vmap(draw)(keys_B))
    router_DE = jax.lax.all_gather(router_DE, "fsdp", axis=0, tiled=True)
    return jnp.einsum("btd,de->bte", x_BTD, router_DE, precision=jax.lax.Precision.HIGHEST)


def _experts(rows_MD, sizes_E, params: ExpertParams, options: ExpertOptions) -> Float[Array, "rows embed"]:
    """Each row through its expert; over ``tensor``, the sum of all devices' results is the result."""

    def product(rows, w, axis: int, name: str | None) -> jax.Array:
        w = w if options.reduce_f32 else w.astype(rows.dtype)
        w = jax.lax.all_gather(w, "fsdp", axis=axis, tiled=True).astype(rows.dtype)
        result = options.tag(grouped_matmul(rows, w, sizes_E, options.platform), "projection")
        return result if name is None else options.tag(result, name)

    hidden_MF = product(rows_MD, params.up, 1, "mlp_up")
    if params.gate is None:
        hidden_MF = options.activation(hidden_MF)
    else:
        hidden_MF = options.activation(product(rows_MD, params.gate, 1, "mlp_gate")) * hidden_MF
    return product(options.tag(hidden_MF, "mlp_hidden"), params.down, 2, None)
