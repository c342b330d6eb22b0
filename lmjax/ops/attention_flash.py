"""What our flash attentions for TPU and for Hopper share: their options, and the numbers that stand for nothing."""

import dataclasses
import math
from typing import Any

from lmjax.ops.attention_mask import Mask

HIDDEN = -1e30
"""The score of a key that a query does not see."""
NOTHING = HIDDEN / 2
"""The maximum of no scores: far under any, and so far above HIDDEN that 2 ** (HIDDEN - NOTHING) is 0."""

LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is known while compiling."""

    mask: Mask
    scale: float
    softcap: float | None
    has_slopes: bool
    has_sinks: bool
    save_as: str | None
    interpret: Any

    @property
    def factor(self) -> float:
        """What products are multiplied by: then they are logarithms to base 2, or what a softcap takes the tanh of."""
        return self.scale * LOG2_E if self.softcap is None else self.scale / self.softcap
