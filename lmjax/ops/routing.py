"""Which experts a token goes to, with what weights, and how even that is.

Legend: B batch, T positions, E experts, K choices of a token, G groups of experts.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """How logits become choices."""

    num_experts: int
    experts_per_token: int
    """Choices of a token."""
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """What logits become: a distribution over the experts (Switch, arXiv 2101.03961 equation 1), or each its sigmoid
    (DeepSeek-V3, arXiv 2412.19437 equation 15)."""
    softmax_over: Literal["all", "chosen"] = "all"
    """Whether a token's weights are its scores, or a softmax of the logits of the chosen (arXiv 1701.06538, eq. 3)."""
    renormalize: bool = True
    """Whether a token's weights are divided by their sum."""
    scale: float = 1.0
    """Factor of all weights."""
    groups: int = 1
    """Equal runs of experts; a token chooses within some of them (arXiv 2405.04434, section 2.1.2)."""
    top_groups: int = 1
    """How many: those with the largest sum of their two best."""
    balance_over: Literal["sequence", "batch"] = "sequence"
    """Whether loads and scores are averaged over a sequence before they are multiplied, or over the whole batch."""


class Routing(NamedTuple):
    """What becomes of each token; the best choice first, of equal ones the expert with the lower number."""

    experts: Int[Array, "*tokens choices"]
    weights: Float[Array, "*tokens choices"]
    """float32."""
    scores: Float[Array, "*tokens experts"]
    """float32, of sum 1: what balance is measured by."""


class RouterSums(NamedTuple):
    """Sums over the valid tokens of a batch, float32; ``balance`` and ``z`` have gradients.

    All are additive over rows, and so over devices and micro-batches, but ``balance`` over the batch, which is not.
    """

    balance: Float[Array, "*layers"]
    """Tokens times experts times the sum over experts of (share of choices) x (mean score): 1 a token where both are
    even (Switch, equation 4)."""
    z: Float[Array, "*layers"]
    """Squared log-normalisers of the logits (ST-MoE, arXiv 2202.08906 equation 5)."""
    load: Float[Array, "*layers experts"]
    """Choices of each expert, dropped ones too."""
    dropped: Float[Array, "*layers"]
    """Choices that found their expert full."""
    entropy: Float[Array, "*layers"]
    """Of the scores, in nats."""
    not_finite: Float[Array, "*layers"]
    """Tokens with a logit that is no finite number."""


def route(
    logits: Float[Array, "*tokens experts"], bias_E: Float[Array, " experts"] | None, options: RouterOptions
) -> Routing:
    """The choices of every token. ``logits`` are float32; ``bias`` changes what is chosen, and no weight (arXiv
    2408.15664, equation 3)."""
    scores = jax.nn.softmax(logits) if options.scores == "softmax" else jax.nn.sigmoid(logits)
    preference = jax.lax.stop_gradient(scores if bias_E is None else scores + bias_E)
    if options.groups > 1:
        preference = _within_groups(preference, options)
    experts = jax.lax.top_k(preference, options.experts_per_token)[1]
    if options.softmax_over == "chosen":
        weights = jax.nn.softmax(jnp.take_along_axis(logits, experts, axis=-1))
    else:
        weights = jnp.take_along_axis(scores, experts, axis=-1)
    if options.renormalize:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    if options.scale != 1:
        weights = weights * options.scale
    if options.scores == "sigmoid":
        scores = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    return Routing(experts, weights, scores)


def _within_groups(preference: jax.Array, options: RouterOptions) -> jax.Array:
    """-inf in all groups but the best."""
    grouped = preference.reshape(*preference.shape[:-1], options.groups, -1)
    best_two = jax.lax.top_k(grouped, min(2, grouped.shape[-1]))[0]
    chosen = jax.lax.top_k(jnp.sum(best_two, axis=-1), options.top_groups)[1]
    is_chosen = jnp.any(chosen[..., None] == jnp.arange(options.groups), axis=-2)
    return jnp.where(is_chosen[..., None], grouped, -jnp.inf).reshape(preference.shape)


def router_sums(
    logits_BTE: Float[Array, "batch seq experts"],
    routing: Routing,
    kept_BTK: Bool[Array, "batch seq choices"] | None,
    valid_BT: Bool[Array, "batch seq"],
    options: RouterOptions,
    batch_axes: tuple[str, ...] = (),
) -> RouterSums:
    """The sums over all devices of ``batch_axes`` (inside of a shard_map), each with its rows.

    ``kept`` are the choices that are not dropped; None keeps all. Tokens that are not valid count nowhere.
    """
    valid_BT1 = valid_BT[..., None]
    num_B = jnp.sum(valid_BT, axis=1, dtype=jnp.float32)
    is_chosen_BTE = jnp.any(routing.experts[..., None] == jnp.arange(options.num_experts), axis=-2)
    load_BE = jnp.sum(is_chosen_BTE & valid_BT1, axis=1, dtype=jnp.float32)
    scores_BE = jnp.sum(jnp.where(valid_BT1, routing.scores, 0), axis=1)

    def over_devices(sums):
        return jax.lax.psum(sums, batch_axes) if batch_axes else sums

    per_choice = options.num_experts / options.experts_per_token
    if options.balance_over == "sequence":
        balance = over_devices(jnp.sum(load_BE * scores_BE / jnp.maximum(num_B, 1)[:, None]) * per_choice)
    else:
        load_E, scores_E, num = over_devices((jnp.sum(load_BE, 0), jnp.sum(scores_BE, 0), jnp.sum(num_B)))
        balance = jnp.sum(load_E * scores_E) / jnp.maximum(num, 1) * per_choice

    def over_tokens(values_BT):
        return jnp.sum(jnp.where(valid_BT, values_BT, 0.0))

    scores_BTE = jax.lax.stop_gradient(routing.scores)
    z, load, dropped, entropy, not_finite = over_devices(
        (
            over_tokens(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))),
            jnp.sum(load_BE, axis=0),
            over_tokens(0.0 if kept_BTK is None else jnp.sum(~kept_BTK, axis=-1)),
            over_tokens(-jnp.sum(jax.scipy.special.xlogy(scores_BTE, scores_BTE), axis=-1)),
            over_tokens(~jnp.all(jnp.isfinite(logits_BTE), axis=-1)),
        )
    )
    return RouterSums(balance, z, load, dropped, entropy, not_finite)
