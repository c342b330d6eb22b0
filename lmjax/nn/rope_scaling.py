"""Rotary frequencies for rows longer than those that a model was first trained on.

Each class mirrors one function of transformers' ``modeling_rope_utils.ROPE_INIT_FUNCTIONS``. ``frequencies`` gives the
frequencies, shaped (pairs,) or (batch, places, pairs), and the factor of cosines and sines.
"""

import math
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
import pydantic
from jaxtyping import Array, Float, Int

from lmjax.schema import config_class

Lengths = Int[Array, "batch places 1"]
"""Positions of the document at each place."""

Frequencies = tuple[Float[Array | np.ndarray, "..."], float]


@config_class
class LinearScaling:
    """Positions are divided (position interpolation, arXiv 2306.15595)."""

    kind: Literal["linear"] = "linear"
    """Which class of scaling this is."""
    factor: float
    """By what positions are divided."""

    def __post_init__(self) -> None:
        _check(self, factor=1.0)

    def frequencies(self, theta: float, width: int, lengths: Lengths) -> Frequencies:
        return powers(theta, width) / np.float32(self.factor), 1.0


@config_class
class DynamicScaling:
    """The base grows with the length of the document, beyond the first length ("dynamic NTK")."""

    kind: Literal["dynamic"] = "dynamic"
    """Which class of scaling this is."""
    factor: float
    """How strongly the base grows: theta x (factor x length / original_length - factor + 1)^(width / (width - 2))."""
    original_length: int
    """Positions up to which nothing changes."""

    def __post_init__(self) -> None:
        _check(self, factor=1.0, original_length=1)

    def frequencies(self, theta: float, width: int, lengths: Lengths) -> Frequencies:
        if width <= 2:
            return powers(theta, width), 1.0  # the one frequency is 1 for every base
        length = jnp.maximum(lengths, self.original_length).astype(jnp.float32)
        growth = (self.factor * length / self.original_length - (self.factor - 1)) ** (width / (width - 2))
        exponents = np.arange(0, width, 2, dtype=np.float32) / width
        return 1.0 / (theta * growth) ** exponents, 1.0


@config_class
class YarnScaling:
    """High frequencies stay, low ones are divided, those between are mixed (YaRN, arXiv 2309.00071, section 3.2)."""

    kind: Literal["yarn"] = "yarn"
    """Which class of scaling this is."""
    factor: float
    """By what low frequencies are divided."""
    original_length: int
    """Positions of the rows that the model was first trained on."""
    beta_fast: float = 32.0
    """Turns within original_length from which a frequency stays."""
    beta_slow: float = 1.0
    """Turns within original_length up to which a frequency is divided."""
    attention_factor: float | None = None
    """Factor of cosines and sines; 0.1 ln(factor) + 1 by default."""
    truncate: bool = True
    """Whether the borders between the three ranges lie on whole dimensions."""

    def __post_init__(self) -> None:
        _check(self, factor=1.0, original_length=1)
        _check_positive(self, "beta_slow", "attention_factor")
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast is {self.beta_fast} and beta_slow {self.beta_slow}; the first is the larger")

    def frequencies(self, theta: float, width: int, lengths: Lengths) -> Frequencies:
        def dimension(turns: float) -> float:
            return width * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        if low == high:
            high += 0.001
        divided = np.clip((np.arange(width // 2, dtype=np.float32) - low) / (high - low), 0, 1)
        base = powers(theta, width)
        frequencies = base / self.factor * divided + base * (1 - divided)
        factor = 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor
        return frequencies.astype(np.float32), factor


@config_class
class LongRopeScaling:
    """Each frequency has a divisor of its own, one for short, one for long documents (LongRoPE, arXiv 2402.13753)."""

    kind: Literal["longrope"] = "longrope"
    """Which class of scaling this is."""
    short_factors: tuple[float, ...]
    """Divisors in documents of up to original_length positions, one a pair."""
    long_factors: tuple[float, ...]
    """Divisors in longer ones, one a pair."""
    original_length: int
    """Positions of the rows that the model was first trained on."""
    attention_factor: float
    """Factor of cosines and sines, as sqrt(1 + ln(longest / original_length) / ln(original_length))."""

    def __post_init__(self) -> None:
        _check(self, original_length=1)
        _check_positive(self, "attention_factor")
        if len(self.short_factors) != len(self.long_factors):
            raise ValueError(
                f"there are {len(self.short_factors)} short_factors and {len(self.long_factors)} long_factors; "
                "both have one number for each pair of dimensions"
            )

    def frequencies(self, theta: float, width: int, lengths: Lengths) -> Frequencies:
        base = powers(theta, width)
        short, long = (base / np.array(f, np.float32) for f in (self.short_factors, self.long_factors))
        return jnp.where(lengths > self.original_length, long, short), self.attention_factor


@config_class
class Llama3Scaling:
    """Long waves are divided, short ones stay, those between are mixed (Llama 3.1, arXiv 2407.21783)."""

    kind: Literal["llama3"] = "llama3"
    """Which class of scaling this is."""
    factor: float
    """By what low frequencies are divided."""
    low_frequency_factor: float
    """A wave longer than original_length / low_frequency_factor is divided."""
    high_frequency_factor: float
    """A wave shorter than original_length / high_frequency_factor stays."""
    original_length: int
    """Positions of the rows that the model was first trained on."""

    def __post_init__(self) -> None:
        _check(self, factor=1.0, original_length=1)
        _check_positive(self, "low_frequency_factor")
        if self.high_frequency_factor <= self.low_frequency_factor:
            raise ValueError(
                f"high_frequency_factor is {self.high_frequency_factor} and low_frequency_factor "
                f"{self.low_frequency_factor}; the first is the larger"
            )

    def frequencies(self, theta: float, width: int, lengths: Lengths) -> Frequencies:
        base = powers(theta, width)
        turns = self.original_length * base / (2 * math.pi)
        kept = (turns - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
        kept = np.clip(kept, 0, 1)
        return (base / self.factor * (1 - kept) + base * kept).astype(np.float32), 1.0


RopeScaling = Annotated[
    LinearScaling | DynamicScaling | YarnScaling | LongRopeScaling | Llama3Scaling,
    pydantic.Field(discriminator="kind"),
]


def powers(theta: float, width: int) -> Float[np.ndarray, " pairs"]:
    """theta^(-2i / width), the frequencies without a scaling."""
    return (theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)).astype(np.float32)


def _check(scaling, **least: float) -> None:
    for name, bound in least.items():
        value = getattr(scaling, name)
        if value < bound:
            raise ValueError(f"{name} is {value}; it has to be {bound} or more")


def _check_positive(scaling, *names: str) -> None:
    for name in names:
        value = getattr(scaling, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}; it has to be above 0")
