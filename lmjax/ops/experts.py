"""A layer of experts over the mesh: routing, dispatch, the experts' products, and what comes back.

Legend: B batch, T positions, D embed, E experts, F hidden of an expert, K choices, N tokens of a device, M rows.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lmjax.mesh import BATCH_AXES, FSDP_AXES
from lmjax.ops.expert_dispatch import capacity_of, dropless, from_experts, to_experts, with_capacity
from lmjax.ops.expert_exchange import EMULATED_ON, plan_exchange, sent_back, sent_to_experts
from lmjax.ops.grouped_matmul import grouped_matmul, varying_together
from lmjax.ops.routing import RouterOptions, RouterSums, Routing, route, router_sums
from lmjax.sharding import activation_spec, parameter_spec

ExpertExchange = Literal["gather", "ragged"]
"""How tokens that are not dropped reach experts on other devices. ``gather``: each device gets the tokens of all, and
what all make of them is summed (ring of experts). ``ragged``: each choice is sent to its expert's device and back, by a
ragged all-to-all. The second sends less where more devices share the experts than a token has choices."""


def choose_exchange(
    name: ExpertExchange | Literal["auto"], choices: int, devices: int, platform: str
) -> ExpertExchange:
    """What ``name`` stands for where a token has so many choices and so many devices share the experts."""
    if name != "auto":
        return name
    return "ragged" if devices > choices and platform not in EMULATED_ON else "gather"


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
    "gate": ("experts", "expert_embed", "expert_mlp"),
    "up": ("experts", "expert_embed", "expert_mlp"),
    "down": ("experts", "expert_mlp", "expert_embed"),
}
"""The logical axes of every parameter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """What a layer of experts does."""

    router: RouterOptions
    activation: Callable[[jax.Array], jax.Array]
    capacity_factor: float | None
    """Slots of an expert in a sequence, as a multiple of its even share; None drops no choice."""
    exchange: ExpertExchange
    """How choices that are not dropped reach their experts; slots go by an all-to-all of their own."""
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
        dispatched = _with_capacity if options.capacity_factor is not None else DROPLESS[options.exchange]
        y_BTD, kept_BTK = dispatched(x_BTD, routing, valid_BT, params, options)
        sums = router_sums(logits_BTE, routing, kept_BTK, valid_BT, options.router, BATCH_AXES)
        if y_spec[1] is None:
            return jax.lax.psum(y_BTD, "tensor"), sums
        return scattered_sum(y_BTD, "tensor", 1), sums

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
    router_DE = jax.lax.all_gather(router_DE, FSDP_AXES, axis=0, tiled=True)
    return jnp.einsum("btd,de->bte", x_BTD, router_DE, precision=jax.lax.Precision.HIGHEST)


def _gathered(x_BTD, routing: Routing, valid_BT, params: ExpertParams, options: ExpertOptions):
    """Nothing dropped: each device along ``expert`` sees the tokens of all and adds what its experts make of them.

    Its rows are as many as these tokens could have choices there; what is not used of them is not multiplied.
    """
    num_here = params.up.shape[0]
    first = jax.lax.axis_index("expert") * num_here
    weights_NK, experts_NK = (array.reshape(-1, array.shape[2]) for array in (routing.weights, routing.experts))
    mine = (x_BTD.reshape(-1, x_BTD.shape[2]), weights_NK, experts_NK, valid_BT.reshape(-1))
    x_ND, weights_NK, experts_NK, valid_N = (gathered(array, "expert", 0) for array in mine)
    is_here_NK = (experts_NK >= first) & (experts_NK < first + num_here)
    here_NK = jnp.where(is_here_NK, experts_NK - first, num_here)
    dispatch = dropless(here_NK[None], valid_N[None], num_here)
    most = x_ND.shape[0] * min(num_here, experts_NK.shape[1])
    dispatch = dispatch._replace(choice_of_row=dispatch.choice_of_row[:most])
    rows_MD = _experts(to_experts(x_ND, dispatch), dispatch.sizes, params, options)
    y_ND = scattered_sum(from_experts(rows_MD, weights_NK, dispatch), "expert", 0)
    return y_ND.reshape(x_BTD.shape), None


def _sent(x_BTD, routing: Routing, valid_BT, params: ExpertParams, options: ExpertOptions):
    """Nothing dropped: each choice's token goes to its expert's device, and what this makes of it comes back.

    A device's rows are as many as could come, should all tokens choose its experts.
    """
    x_ND = x_BTD.reshape(-1, x_BTD.shape[2])
    dispatch = dropless(routing.experts, valid_BT, options.router.num_experts)
    exchange = plan_exchange(dispatch.sizes)
    num_here, choices = params.up.shape[0], routing.experts.shape[2]
    most = jax.lax.axis_size("expert") * len(x_ND) * min(num_here, choices)
    rows_MD = sent_to_experts(to_experts(x_ND, dispatch), exchange, most, options.platform)
    rows_MD = _experts(rows_MD, exchange.sizes, params, options)
    rows_MD = sent_back(rows_MD, exchange, len(x_ND) * choices, options.platform)
    weights_NK = routing.weights.reshape(dispatch.row_of_choice.shape)
    return from_experts(rows_MD, weights_NK, dispatch).reshape(x_BTD.shape), None


DROPLESS = {"gather": _gathered, "ragged": _sent}


def _with_capacity(x_BTD, routing: Routing, valid_BT, params: ExpertParams, options: ExpertOptions):
    """With capacity: each device along ``expert`` sends each other one the slots of its experts, and gets them back."""
    router, factor = options.router, options.capacity_factor
    assert factor is not None
    capacity = capacity_of(x_BTD.shape[1], router.num_experts, router.experts_per_token, factor)
    dispatch = with_capacity(routing.experts, valid_BT, router.num_experts, capacity)
    rows_EMD = to_experts(x_BTD.reshape(-1, x_BTD.shape[2]), dispatch).reshape(router.num_experts, -1, x_BTD.shape[2])
    rows_EMD = jax.lax.all_to_all(rows_EMD, "expert", 0, 1, tiled=True)
    rows_EMD = _experts(rows_EMD, None, params, options)
    rows_EMD = jax.lax.all_to_all(rows_EMD, "expert", 1, 0, tiled=True)
    weights_NK = routing.weights.reshape(dispatch.row_of_choice.shape)
    y_ND = from_experts(rows_EMD.reshape(-1, x_BTD.shape[2]), weights_NK, dispatch)
    return y_ND.reshape(x_BTD.shape), dispatch.kept


def gathered(x: jax.Array, axis_name: str, axis: int) -> jax.Array:
    """All devices' parts of x. A compiler may copy what it gathers from one device."""
    if jax.lax.axis_size(axis_name) == 1:
        return x
    return jax.lax.all_gather(x, axis_name, axis=axis, tiled=True)


def scattered_sum(x: jax.Array, axis_name: str, axis: int) -> jax.Array:
    """This device's part of the sum over all of them."""
    if jax.lax.axis_size(axis_name) == 1:
        return x
    return jax.lax.psum_scatter(x, axis_name, scatter_dimension=axis, tiled=True)


def _experts(rows, sizes_E, params: ExpertParams, options: ExpertOptions) -> jax.Array:
    """Each row through its expert; over ``tensor``, the sum of all devices' results is the result.

    ``rows`` are (experts, rows, embed) where all experts have as many, or (rows, embed) of which each has some.
    """

    def product(rows, w, axis: int, name: str | None) -> jax.Array:
        w = w if options.reduce_f32 else w.astype(rows.dtype)
        w = gathered(w, "fsdp", axis).astype(rows.dtype)
        if sizes_E is None:
            result = jnp.einsum("emd,edf->emf", rows, w)
        else:
            result = grouped_matmul(rows, w, sizes_E, options.platform)
        result = options.tag(result, "projection")
        return result if name is None else options.tag(result, name)

    hidden = product(rows, params.up, 1, "mlp_up")
    if params.gate is None:
        hidden = options.activation(hidden)
    else:
        hidden = options.activation(product(rows, params.gate, 1, "mlp_gate")) * hidden
    return product(options.tag(hidden, "mlp_hidden"), params.down, 2, None)
