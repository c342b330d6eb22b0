"""The KV cache: keys and values of the tokens so far, for every layer."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lmjax.mesh import BATCH_AXES
from lmjax.models.config import AttentionKind
from lmjax.models.decoder import DecoderConfig, GroupCache
from lmjax.nn.cache import LayerCache, slots_of_window
from lmjax.sharding import activation_spec


def empty_cache(config: DecoderConfig, batch: int, slots: int, dtype: jnp.dtype, *, part: int) -> list[GroupCache]:
    """Zeros for ``slots`` tokens of each of ``batch`` rows, as ``Decoder.hidden_with_cache`` takes and returns them.

    A layer with a window has slots for the window and the ``part`` tokens that are written at once, if those are fewer.

    A list over segments of tuples over the segment's pattern; each array is (repeats, batch, kv_heads, slots, head_dim)
    in ``dtype``, sharded by batch over data, fsdp and expert, and by kv_heads over ``tensor`` where that divides them.
    """

    heads, *widths = config.cache_shape

    def layer(repeats: int, kind: AttentionKind) -> LayerCache:
        window = config.window(kind)
        kept = slots if window is None else min(slots, slots_of_window(window, part))
        shapes = [(repeats, batch, heads, kept, width) for width in widths]
        axes = ("layers", "batch", "kv_heads", "seq", "head_dim")
        return LayerCache(*(jnp.zeros(shape, dtype, out_sharding=activation_spec(axes, shape)) for shape in shapes))

    return [tuple(layer(segment.repeats, kind.attention) for kind in segment.pattern) for segment in config.segments]


def repeat_rows(cache: list[GroupCache], times: int) -> list[GroupCache]:
    """Every row ``times`` times, one after the other; no row leaves its devices."""
    if times == 1:
        return cache

    def repeat(stacked: jax.Array) -> jax.Array:
        spec = jax.typeof(stacked).sharding.spec
        local = functools.partial(jnp.repeat, repeats=times, axis=1)
        return jax.shard_map(local, in_specs=spec, out_specs=spec)(stacked)

    return jax.tree.map(repeat, cache)


def repeat_leading(rows: jax.Array, times: int) -> jax.Array:
    """The same for an array of (rows, ...) that is split by rows alone."""
    spec = P(BATCH_AXES, *(None,) * (rows.ndim - 1))
    local = functools.partial(jnp.repeat, repeats=times, axis=0)
    return jax.shard_map(local, in_specs=spec, out_specs=spec)(rows)
