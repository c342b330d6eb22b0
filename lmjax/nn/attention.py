"""Self-attention with grouped K/V heads, rotary positions and an optional sliding window.

Legend: B batch, T query positions, S slots of the cache, D embed, N query heads, K kv heads, H head_dim.
"""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from lmjax.nn.cache import CacheWrite, LayerCache, written
from lmjax.nn.execution import LayerExecution
from lmjax.nn.param import Projection
from lmjax.nn.position import rotate
from lmjax.nn.tags import tag
from lmjax.ops.attention import attention
from lmjax.ops.attention_cached import cached_attention
from lmjax.ops.attention_mask import Mask


class Attention(nnx.Module):
    """Multi-head, grouped-query (arXiv 2305.13245) or multi-query attention (arXiv 1911.02150)."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        window: int | None,
        rope_theta: float,
        output_std: float,
        key: PRNGKeyArray,
    ):
        self.head_dim = head_dim
        self.window = window
        self.rope_theta = rope_theta
        q_key, k_key, v_key, out_key = jax.random.split(key, 4)
        q_axes, kv_axes = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        q_out, kv_out = ("batch", "seq", "heads", "head_dim"), ("batch", "seq", "kv_heads", "head_dim")
        self.query = Projection("btd,dnh->btnh", (embed_dim, num_heads, head_dim), q_axes, q_out, key=q_key)
        self.key = Projection("btd,dkh->btkh", (embed_dim, num_kv_heads, head_dim), kv_axes, kv_out, key=k_key)
        self.value = Projection("btd,dkh->btkh", (embed_dim, num_kv_heads, head_dim), kv_axes, kv_out, key=v_key)
        self.out = Projection(
            "btnh,nhd->btd",
            (num_heads, head_dim, embed_dim),
            ("heads", "head_dim", "embed"),
            ("batch", "seq_residual", "embed"),
            std=output_std,
            key=out_key,
        )

    def __call__(
        self,
        x_BTD: Float[Array, "batch seq embed"],
        positions_BT: Int[Array, "batch seq"],
        segment_ids_BT: Int[Array, "batch seq"] | None,
        execution: LayerExecution,
        cache: LayerCache | None = None,
        write: CacheWrite | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], LayerCache | None]:
        """The output, and the cache with these tokens in it. With a cache, ``segment_ids`` is None: positions tell."""
        q_BTNH = tag(rotate(self.query(x_BTD, execution), positions_BT, self.rope_theta), "query")
        k_BTKH = tag(rotate(self.key(x_BTD, execution), positions_BT, self.rope_theta), "key")
        v_BTKH = tag(self.value(x_BTD, execution), "value")
        scale = self.head_dim**-0.5
        if cache is None:
            out_BTNH = attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                mask=Mask(causal=True, window=self.window),
                segment_ids=segment_ids_BT,
                scale=scale,
                kernel=execution.attention_kernel,
                platform=execution.platform,
                save_as="attention_out",
            )
        else:
            assert write is not None
            assert segment_ids_BT is None
            cache, key_positions_BS = written(cache, k_BTKH, v_BTKH, write)
            out_BTNH = cached_attention(q_BTNH, *cache, positions_BT, key_positions_BS, window=self.window, scale=scale)
        return self.out(out_BTNH, execution), cache
