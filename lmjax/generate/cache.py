"""The KV cache: keys and values of every token so far, for every layer."""

import jax.numpy as jnp

from lmjax.models.decoder import DecoderConfig, GroupCache
from lmjax.nn.cache import LayerCache
from lmjax.sharding import activation_spec


def empty_cache(config: DecoderConfig, batch: int, slots: int, dtype: jnp.dtype) -> list[GroupCache]:
    """Zeros for ``slots`` tokens of each of ``batch`` rows, as ``Decoder.hidden_with_cache`` takes and returns them.

    A list over segments of tuples over the segment's pattern; each array is (repeats, batch, slots, kv_heads, head_dim)
    in ``dtype``, sharded by batch over (data, fsdp) and by kv_heads over ``tensor`` where that divides them.
    """

    def zeros(repeats: int):
        shape = (repeats, batch, slots, config.kv_heads, config.head_width)
        spec = activation_spec(("layers", "batch", "seq", "kv_heads", "head_dim"), shape)
        return jnp.zeros(shape, dtype, out_sharding=spec)

    return [
        tuple(LayerCache(zeros(segment.repeats), zeros(segment.repeats)) for _ in segment.pattern)
        for segment in config.segments
    ]
