"""Mixture of experts: the feed-forward half of a block, as many small MLPs of which each token goes through a few."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from lmjax.nn.execution import LayerExecution
from lmjax.nn.mlp import ACTIVATIONS, MLP, Activation
from lmjax.nn.param import STD, Projection, constant, matrix
from lmjax.nn.tags import tag
from lmjax.ops.experts import EXPERT_AXES, ExpertOptions, ExpertParams, choose_exchange, expert_mlp
from lmjax.ops.routing import RouterOptions, RouterSums
from lmjax.schema import config_class

MLPKind = Literal["dense", "moe"]


@config_class
class MoEConfig:
    """The experts of a decoder, and how tokens are routed to them; by default as Mixtral (arXiv 2401.04088)."""

    num_experts: int
    """Experts of a block."""
    experts_per_token: int
    """How many of them a token goes through."""
    expert_dim: int | None = None
    """Width of an expert's hidden layer, where dense blocks have another: mlp_dim by default."""
    pattern: tuple[MLPKind, ...] = ("moe",)
    """Feed-forward halves of successive blocks after the dense first ones, repeated over the depth."""
    dense_first: int = 0
    """Blocks from the first on that are dense, before the pattern begins (DeepSeek-V3)."""

    scores: Literal["softmax", "sigmoid"] = "softmax"
    """What the router's logits become: a distribution over the experts, or each its sigmoid (DeepSeek-V3)."""
    softmax_over: Literal["all", "chosen"] = "all"
    """Whether a token's weights are its experts' scores, or a softmax of the logits of the chosen experts."""
    renormalize: bool = True
    """Whether a token's weights are divided by their sum."""
    weight_scale: float = 1.0
    """Factor of the experts' weights."""
    groups: int = 1
    """Equal runs of experts; a token chooses within some of them."""
    top_groups: int = 1
    """How many groups a token chooses within: those with the largest sum of their two best scores."""
    choice_bias_rate: float | None = None
    """How far a bias of each expert, which changes what is chosen and no weight, moves in an update: up if the expert
    had less than its share, down if more (arXiv 2408.15664; 0.001 there). null has no such bias; 0 keeps it still."""
    jitter: float = 0.0
    """In training the router's input is multiplied by numbers from 1 - jitter to 1 + jitter (Switch, 0.01)."""
    capacity_factor: float | None = None
    """Slots of an expert in a sequence, as a multiple of its even share; choices beyond them are dropped. null drops
    none. Generation drops none either way."""

    shared_dim: int | None = None
    """Width of an MLP that all tokens go through beside the experts; null has none."""
    shared_gate: bool = False
    """Whether what it gives is multiplied by the sigmoid of a product of the token with a vector (Qwen2-MoE)."""

    balance_weight: float = 0.01
    """Weight of the loss that is 1 where choices are even (Switch, arXiv 2101.03961 equation 4), for each block."""
    balance_over: Literal["sequence", "batch"] = "sequence"
    """Whether that loss is of each sequence, averaged over the global batch, or of the batch as a whole, which has no
    meaning with accumulation and is refused there."""
    z_weight: float = 0.0
    """Weight of the mean squared log-normaliser of the router's logits (ST-MoE, arXiv 2202.08906; 0.001 there)."""

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token} and num_experts is {self.num_experts}: a token cannot "
                "go through more experts than there are"
            )
        if "moe" not in self.pattern:
            raise ValueError(f"pattern is {list(self.pattern)}; it has to name a moe block, or leave the section out")
        if self.num_experts % self.groups:
            raise ValueError(
                f"num_experts {self.num_experts} does not divide into groups {self.groups}: {self.num_experts} mod "
                f"{self.groups} = {self.num_experts % self.groups}"
            )
        if self.top_groups > self.groups:
            raise ValueError(f"top_groups is {self.top_groups} and groups is {self.groups}; it is at most that")
        if self.experts_per_token > self.num_experts // self.groups * self.top_groups:
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, but {self.top_groups} of {self.groups} groups have "
                f"{self.num_experts // self.groups * self.top_groups} experts"
            )
        if self.softmax_over == "chosen":
            for name, ineffective in (("scores", self.scores != "softmax"), ("renormalize", not self.renormalize)):
                if ineffective:
                    raise ValueError(
                        f"{name} is {getattr(self, name)} and softmax_over is chosen, whose weights are a softmax of "
                        "sum 1; leave one of them out"
                    )
        if self.experts_per_token == 1 < self.num_experts and (self.renormalize or self.softmax_over == "chosen"):
            raise ValueError(
                "experts_per_token is 1 and weights are made to have the sum 1, so that each is 1 and the router "
                "learns nothing from the loss; set renormalize=false (and softmax_over=all), as Switch"
            )
        if self.shared_gate and self.shared_dim is None:
            raise ValueError("shared_gate has an effect with shared_dim only, which is null")

    def _check_numbers(self) -> None:
        for name in ("num_experts", "experts_per_token", "expert_dim", "groups", "top_groups", "shared_dim"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it has to be 1 or more")
        for name in ("weight_scale", "capacity_factor"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it has to be above 0")
        for name in ("dense_first", "balance_weight", "z_weight", "choice_bias_rate"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name} is {value}; it has to be 0 or more")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter is {self.jitter}; it has to be at least 0 and below 1")

    @property
    def router(self) -> RouterOptions:
        return RouterOptions(
            num_experts=self.num_experts,
            experts_per_token=self.experts_per_token,
            scores=self.scores,
            softmax_over=self.softmax_over,
            renormalize=self.renormalize,
            scale=self.weight_scale,
            groups=self.groups,
            top_groups=self.top_groups,
            balance_over=self.balance_over,
        )


class Router(nnx.Module):
    """What gives a token's logits over the experts; float32 whatever the rest computes in.

    It begins normal with the deviation of one over the root of ``embed_dim``: logits of what a norm gives then have
    variance 1, whatever the width, where the other matrices' 0.02 gives a narrow model's nearly 0.
    """

    def __init__(self, config: MoEConfig, embed_dim: int, *, key: PRNGKeyArray):
        shape = (embed_dim, config.num_experts)
        self.matrix = matrix(key, shape, EXPERT_AXES["router"], std=embed_dim**-0.5)
        has_bias = config.choice_bias_rate is not None
        self.choice_bias = constant(0.0, (config.num_experts,), EXPERT_AXES["choice_bias"]) if has_bias else None


class ExpertMatrices(nnx.Module):
    """One projection of all experts."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], *, std: float = STD, key: PRNGKeyArray):
        self.kernel = matrix(key, shape, axes, std)


class MoE(nnx.Module):
    """Experts, their router, and the MLP that all tokens share where there is one."""

    def __init__(
        self,
        config: MoEConfig,
        embed_dim: int,
        expert_dim: int,
        *,
        activation: Activation,
        gated: bool,
        output_std: float,
        key: PRNGKeyArray,
    ):
        router_key, gate_key, up_key, down_key, shared_key, shared_gate_key = jax.random.split(key, 6)
        self.config = config
        self.activation: Activation = activation
        shape = (config.num_experts, embed_dim, expert_dim)
        self.router = Router(config, embed_dim, key=router_key)
        self.gate = ExpertMatrices(shape, EXPERT_AXES["gate"], key=gate_key) if gated else None
        self.up = ExpertMatrices(shape, EXPERT_AXES["up"], key=up_key)
        self.down = ExpertMatrices((shape[0], shape[2], shape[1]), EXPERT_AXES["down"], std=output_std, key=down_key)
        self.shared = None if config.shared_dim is None else self._shared(embed_dim, gated, output_std, shared_key)
        one, axes = (embed_dim, 1), ("embed", "norm")
        self.shared_gate = (
            Projection("btd,de->bte", one, axes, ("batch", "seq", "embed"), key=shared_gate_key)
            if config.shared_gate
            else None
        )

    def _shared(self, embed_dim: int, gated: bool, output_std: float, key: PRNGKeyArray) -> MLP:
        assert self.config.shared_dim is not None
        return MLP(
            embed_dim,
            self.config.shared_dim,
            activation=self.activation,
            gated=gated,
            bias=False,
            output_std=output_std,
            key=key,
        )

    def __call__(
        self,
        x_BTD: Float[Array, "batch seq embed"],
        valid_BT: Bool[Array, "batch seq"],
        execution: LayerExecution,
        *,
        keys_B: PRNGKeyArray | None = None,
        may_drop: bool = True,
    ) -> tuple[Float[Array, "batch seq embed"], RouterSums]:
        """``keys``, one a row, are for jitter. Unless it ``may_drop``, the capacity is left out of account."""
        config = self.config
        options = ExpertOptions(
            router=config.router,
            activation=ACTIVATIONS[self.activation],
            capacity_factor=config.capacity_factor if may_drop else None,
            exchange=choose_exchange(
                execution.expert_exchange,
                config.experts_per_token,
                jax.sharding.get_abstract_mesh().shape["expert"],
                execution.hardware.platform,
            ),
            jitter=config.jitter,
            platform=execution.hardware.platform,
            reduce_f32=execution.reduce_in_float32,
            tag=tag,  # pyright: ignore[reportArgumentType]
        )
        bias = self.router.choice_bias
        params = ExpertParams(
            router=self.router.matrix[...],
            choice_bias=None if bias is None else bias[...],
            gate=None if self.gate is None else self.gate.kernel[...],
            up=self.up.kernel[...],
            down=self.down.kernel[...],
        )
        y_BTD, sums = expert_mlp(x_BTD, valid_BT, params, options, keys_B)
        if self.shared is not None:
            shared_BTD = self.shared(x_BTD, execution)
            if self.shared_gate is not None:
                gate_BT1 = jax.nn.sigmoid(self.shared_gate(x_BTD, execution))
                shared_BTD = jax.sharding.reshard(gate_BT1, jax.typeof(shared_BTD).sharding.spec) * shared_BTD
            y_BTD = y_BTD + shared_BTD
        return y_BTD, sums


def moved_bias(
    bias: Float[Array, "*layers experts"], load: Float[Array, "*layers experts"], rate: float
) -> Float[Array, "*layers experts"]:
    """The router's bias after an update with these loads: up by ``rate`` below the mean load, down above it (arXiv
    2408.15664, algorithm 1)."""
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)
