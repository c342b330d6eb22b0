"""What is asked of a generation, and which tokens may be drawn."""

import dataclasses
import math

from lmjax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How prompts are continued. Raises InputError for what cannot be, or would have no effect."""

    max_tokens: int = 64
    """New tokens at most."""
    temperature: float = 0.8
    """What logits are divided by; 0 takes the most probable token every time."""
    top_k: int | None = None
    """Draw from this many most probable tokens."""
    top_p: float | None = None
    """Then from the fewest most probable ones that have this probability together (arXiv 1904.09751)."""
    min_p: float | None = None
    """Then from those that have at least this share of the most probable one's probability (arXiv 2407.01082)."""
    num_samples: int = 1
    """Continuations of each prompt."""
    stop: tuple[str, ...] = ()
    """A text ends before the first of these that appears in it."""
    logprobs: int | None = None
    """Report the log-probability of each token, and this many most probable ones in its place."""
    seed: int = 0
    """Of the random numbers."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InputError(f"the number of new tokens is {self.max_tokens}; ask for 1 or more")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; it has to be 0 (the most probable token) or above")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; tokens are drawn from 1 or more")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise InputError(f"{name} is {value}; it has to be above 0 and at most 1")
        if self.num_samples < 1:
            raise InputError(f"num_samples is {self.num_samples}; ask for 1 or more")
        if self.logprobs is not None and self.logprobs < 0:
            raise InputError(f"logprobs is {self.logprobs}; it is a number of tokens beside the chosen one: 0 or more")
        if "" in self.stop:
            raise InputError("a stop string is empty, and would end every text before it begins; leave it out")
        if self.temperature == 0:
            chosen = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
            if self.num_samples > 1:
                chosen.append("num_samples")
            if chosen:
                raise InputError(
                    f"{', '.join(chosen)}: no effect at temperature 0, which takes the most probable token every time. "
                    "Leave them out, or give a temperature above 0."
                )

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never drawn."""
        return not (self.top_k is None and self.top_p is None and self.min_p is None)

    def check_vocabulary(self, size: int) -> None:
        """Raises InputError where more tokens are asked for than a vocabulary of ``size`` has."""
        for name in ("top_k", "logprobs"):
            value = getattr(self, name)
            if value is not None and value > size:
                raise InputError(f"{name} is {value}, but the vocabulary has {size} tokens; ask for at most {size}")
