"""A seeded sweep over what flash attention may be asked for."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lmjax.ops.attention_flash_tpu_tiles import Tiling
from lmjax.ops.attention_kernels import wanted_features
from lmjax.ops.attention_mask import Mask
from tests.ops.attention_case import PLAIN, Case, Features, make_case, run_kernel, run_reference

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
GROUPS = (1, 2, 3)
TILING = Tiling(tile=128, part=64)
"""Small, so that short rows have several tiles, and tiles several parts."""


@dataclasses.dataclass(frozen=True)
class SweepCase:
    """One draw: a mask, features and shapes."""

    seed: int
    mask: Mask
    features: Features
    segmented: bool
    length: int
    head_dim: int
    value_dim: int
    group: int

    def __str__(self) -> str:
        causal = f"window{self.mask.window}" if self.mask.window else "causal"
        mask = causal if self.mask.causal else "bidirectional"
        segments = "-segments" if self.segmented else ""
        shapes = f"{self.length}x{self.head_dim}v{self.value_dim}g{self.group}"
        return f"{self.seed}-{mask}{segments}-{self.features}-{shapes}"

    @property
    def wanted(self) -> frozenset[str]:
        """The features by their names in the table of kernels."""
        return wanted_features(
            self.mask,
            segments=self.segmented,
            prefix=self.features.prefix,
            softcap=self.features.softcap is not None,
            alibi=self.features.alibi,
            sinks=self.features.sinks,
        )

    def arrays(self) -> Case:
        rng = np.random.default_rng(self.seed)
        case = make_case(
            rng,
            batch=1 + self.seed % 2,
            length=self.length,
            num_heads=2 * self.group,
            num_kv_heads=2,
            head_dim=self.head_dim,
        )
        v = rng.normal(size=(*case.k.shape[:3], self.value_dim)).astype(np.float32)
        dout = rng.normal(size=(*case.q.shape[:3], self.value_dim)).astype(np.float32)
        prefix = case.prefix
        if not self.segmented:  # one document a row: its first tokens
            prefix = np.arange(self.length) < rng.integers(0, self.length, size=(len(v), 1))
        slopes = case.slopes / 64  # of the sizes that models have, so that far keys still count
        return case._replace(v=v, dout=dout, prefix=prefix, slopes=slopes)


def sweep(count: int, longest: int = 420) -> list[SweepCase]:
    """The first ``count`` draws, of rows shorter than ``longest``."""
    cases = []
    for seed in range(count):
        rng = np.random.default_rng((7, seed))
        kind = str(rng.choice(("causal", "window", "bidirectional")))
        length = max(4, int(rng.integers(2, longest)))  # three documents and padding
        mask = Mask(causal=kind != "bidirectional", window=int(rng.integers(1, length)) if kind == "window" else None)
        flags = rng.random(5) < 0.5
        head_dim = int(rng.choice(HEAD_DIMS))
        cases.append(
            SweepCase(
                seed=seed,
                mask=mask,
                features=Features(
                    prefix=bool(flags[0]) and kind == "causal",
                    alibi=bool(flags[1]),
                    sinks=bool(flags[2]),
                    softcap=float(rng.uniform(1, 5)) if flags[3] else None,
                ),
                segmented=bool(flags[4]),
                length=length,
                head_dim=head_dim,
                value_dim=128 if head_dim == 192 and rng.random() < 0.5 else head_dim,
                group=int(rng.choice(GROUPS)),
            )
        )
    return cases


IN_ALL, IN_TEST = 20, 4
"""How many of the sweep the larger tier and the tests that everyone runs take; ``make proof-kernels`` takes all."""


def sweep_in_tiers(count: int, longest: int = 420) -> list:
    """The same as parameters of a test."""

    def marks(number: int) -> tuple[pytest.MarkDecorator, ...]:
        return () if number < IN_TEST else (pytest.mark.slow,) if number < IN_ALL else (pytest.mark.proof,)

    return [pytest.param(case, id=str(case), marks=marks(number)) for number, case in enumerate(sweep(count, longest))]


def relative_errors(found, expected) -> list[float]:
    """By the largest value; by 1 where that is smaller, as gradients are that vanish but for rounding."""
    both = zip(found, expected, strict=True)
    return [float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(y).max(), 1)) for x, y in both]


FEATURES_ALONE = ("window", "segments", "prefix", "alibi", "sinks", "softcap")


def check_that_a_feature_has_an_effect(kernel, rng, feature: str, **options) -> None:
    """With it the kernel is the reference with it, and not the one without: what comparisons may be blind to."""
    case = make_case(rng, batch=1, length=140, num_heads=2, num_kv_heads=1, head_dim=16)
    mask = Mask(window=30) if feature == "window" else Mask()
    features = {
        "prefix": Features(prefix=True),
        "alibi": Features(alibi=True),
        "sinks": Features(sinks=True),
        "softcap": Features(softcap=0.5),
    }.get(feature, PLAIN)
    segmented = feature in ("segments", "prefix")
    found = run_kernel(kernel, case, mask, segmented=segmented, features=features, **options)
    same = run_reference(case, mask, segmented=segmented, features=features)
    other = run_reference(case, Mask(), segmented=feature == "prefix")
    assert max(relative_errors(found, same)) < 1e-5
    assert relative_errors(found[:1], other[:1])[0] > 1e-2
