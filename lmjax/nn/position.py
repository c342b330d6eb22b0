"""Positions: rotary embedding and its scalings, sinusoids, and the slopes of ALiBi.

Legend: B batch, T positions, R pairs that are rotated (half of the rotated width).
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lmjax.nn.rope_scaling import RopeScaling, powers


class Rotation(NamedTuple):
    """The angles of every position of a batch, as float32 cosines and sines: made once, and used by every layer."""

    cos_BTR: Float[Array, "batch seq pairs"]
    sin_BTR: Float[Array, "batch seq pairs"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding (RoPE, arXiv 2104.09864, equation 34) of the first ``width`` dimensions of a head."""

    width: int
    theta: float
    interleaved: bool = False
    """Whether dimensions (2i, 2i + 1) are a pair, as in the paper and in GPT-J, and not (i, i + width / 2)."""
    scaling: RopeScaling | None = None

    def rotation(
        self, positions_BT: Int[Array, "batch seq"], lengths_B: Int[Array, " batch"] | None = None
    ) -> Rotation:
        """Angles position x theta^(-2i / width), as ``scaling`` changes them; float32.

        Some scalings go by the length of a row, whatever other rows the batch has: its largest position plus 1, unless
        ``lengths`` are given, as they have to be where the batch holds a part of the row only.
        """
        if self.scaling is None:
            frequencies, factor = powers(self.theta, self.width), 1.0
        else:
            lengths_B = jnp.max(positions_BT, axis=1) + 1 if lengths_B is None else lengths_B
            frequencies, factor = self.scaling.frequencies(self.theta, self.width, lengths_B[:, None, None])
        angles_BTR = positions_BT[:, :, None].astype(jnp.float32) * frequencies
        return Rotation(jnp.cos(angles_BTR) * factor, jnp.sin(angles_BTR) * factor)

    def rotate(
        self, x: Float[Array, "batch seq heads head_dim"], rotation: Rotation
    ) -> Float[Array, "batch seq heads head_dim"]:
        """``x`` with its pairs turned, computed in float32, in the dtype of x.

        The layouts are those of transformers' ``apply_rotary_pos_emb`` in Llama and, interleaved, in GPT-J.
        """
        cos, sin = (table_BTR[:, :, None, :] for table_BTR in rotation)
        rotated, rest = x[..., : self.width].astype(jnp.float32), x[..., self.width :]
        if self.interleaved:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        else:
            first, second = rotated[..., : self.width // 2], rotated[..., self.width // 2 :]
        parts = [first * cos - second * sin, second * cos + first * sin]
        if self.interleaved:
            turned = jnp.stack(parts, axis=-1).reshape(rotated.shape)
        else:
            turned = jnp.concatenate(parts, axis=-1)
        turned = turned.astype(x.dtype)
        return turned if not rest.shape[-1] else jnp.concatenate([turned, rest], axis=-1)


def sinusoids(positions_BT: Int[Array, "batch seq"], width: int) -> Float[Array, "batch seq width"]:
    """sin at the even dimensions, cos at the odd ones, float32 (arXiv 1706.03762, section 3.5)."""
    angles_BTR = positions_BT[:, :, None].astype(jnp.float32) * powers(10_000.0, width)
    pairs = jnp.stack([jnp.sin(angles_BTR), jnp.cos(angles_BTR)], axis=-1)
    spec = jax.typeof(angles_BTR).sharding.spec
    return pairs.reshape(*positions_BT.shape, width, out_sharding=jax.P(*spec))


SlopeRule = Literal["interpolated", "strided"]
"""What is done where the number of heads n is no power of two; m is the next lower one. ``interpolated``: the slopes
of m heads, then every second one of 2 m heads (the authors' own code, BLOOM). ``strided``: of the slopes of 2 m heads
those in odd places, then those in even places, the first n of them (MPT)."""


def alibi_slopes(num_heads: int, rule: SlopeRule) -> Float[np.ndarray, " heads"]:
    """By how much a head's score falls with each position between query and key (ALiBi, arXiv 2108.12409 section 3)."""

    def slopes(count: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)

    lower = 2 ** int(math.log2(num_heads))
    if lower == num_heads:
        found = slopes(num_heads)
    elif rule == "interpolated":
        found = np.concatenate([slopes(lower), slopes(2 * lower)[0::2][: num_heads - lower]])
    else:
        more = slopes(2 * lower)
        found = np.concatenate([more[1::2], more[0::2]])[:num_heads]
    return found.astype(np.float32)
