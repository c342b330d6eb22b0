"""Positions: rotary embedding and its scalings, sinusoids, and the slopes of ALiBi.

Legend: B batch, T positions, R pairs that are rotated (half of the rotated width).
"""

import dataclasses
import math
from typing import NamedTuple

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
        self, positions_BT: Int[Array, "batch seq"], lengths_BT: Int[Array, "batch places"] | None = None
    ) -> Rotation:
        """Angles position x theta^(-2i / width), as ``scaling`` changes them; float32.

        Some scalings go by ``lengths``: those of each position's document (``document_lengths``), whatever lies beside
        it in its row or batch; by default the row is one document.
        """
        if self.scaling is None:
            frequencies, factor = powers(self.theta, self.width), 1.0
        else:
            if lengths_BT is None:
                lengths_BT = jnp.max(positions_BT, axis=1, keepdims=True) + 1
            frequencies, factor = self.scaling.frequencies(self.theta, self.width, lengths_BT[:, :, None])
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


def document_lengths(
    positions_BT: Int[Array, "batch seq"], segment_ids_BT: Int[Array, "batch seq"]
) -> Int[Array, "batch seq"]:
    """The length of the document that each place of a packed row belongs to: its last position plus 1."""
    num_places = positions_BT.shape[1]
    places_T = jnp.arange(num_places)
    next_segment_BT = jnp.pad(segment_ids_BT[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    ends_BT = jnp.where(segment_ids_BT != next_segment_BT, places_T, num_places)
    last_BT = jax.lax.cummin(ends_BT, axis=1, reverse=True)
    return positions_BT + (last_BT - places_T) + 1


def sinusoids(positions_BT: Int[Array, "batch seq"], width: int) -> Float[Array, "batch seq width"]:
    """sin at the even dimensions, cos at the odd ones, float32 (arXiv 1706.03762, section 3.5)."""
    angles_BTR = positions_BT[:, :, None].astype(jnp.float32) * powers(10_000.0, width)
    pairs = jnp.stack([jnp.sin(angles_BTR), jnp.cos(angles_BTR)], axis=-1)
    spec = jax.typeof(angles_BTR).sharding.spec
    return pairs.reshape(*positions_BT.shape, width, out_sharding=jax.P(*spec))


def alibi_slopes(num_heads: int, largest: float = 8.0) -> Float[np.ndarray, " heads"]:
    """By how much a head's score falls with each position between query and key (ALiBi, arXiv 2108.12409 section 3).

    2^(-largest i / n) for head i of n; where n is no power of two, those of the next lower one m, then every second of
    those of 2 m. BLOOM's code and MPT's have the same result.
    """

    def slopes(count: int) -> np.ndarray:
        return 2.0 ** (-largest * np.arange(1, count + 1) / count)

    lower = 2 ** int(math.log2(num_heads))
    return np.concatenate([slopes(lower), slopes(2 * lower)[0::2][: num_heads - lower]]).astype(np.float32)
