"""Optimizer, schedule and decay mask."""

from typing import Any, Literal

import optax

from lmjax.schema import config_class


@config_class
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) with global-norm clipping; decay on matrices only."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down along half a cosine until the last step, or level."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly from 0 to its peak."""
    end_fraction: float | None = None
    """With cosine: the last learning rate as a fraction of the peak; 0.1 by default."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decay of matrices towards 0, times the learning rate; norms are not decayed."""
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this global norm when theirs is larger; null leaves them."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon", "clip_norm"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it has to be above 0")
        for name in ("warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be 0 or more")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be at least 0 and below 1")
        if self.end_fraction is not None:
            if self.schedule == "constant":
                raise ValueError("end_fraction has an effect with schedule cosine only, and schedule is constant")
            if not 0 <= self.end_fraction <= 1:
                raise ValueError(f"end_fraction is {self.end_fraction}; it has to be between 0 and 1")


def make_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by the number of finished updates, for a run of ``num_steps``."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "constant":
        curve = optax.linear_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)
    else:
        fraction = 0.1 if config.end_fraction is None else config.end_fraction
        last = max(num_steps, warmup + 1)
        curve = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, last, end_value=peak * fraction)
    # Counted from 1: an update at a learning rate of 0 would be lost, and the last one has the end's rate.
    return lambda count: curve(count + 1)


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule, decay_mask: Any) -> optax.GradientTransformation:
    """``decay_mask`` is a tree of bools like the parameters: which leaves are decayed."""
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
