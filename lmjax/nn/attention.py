"""Self-attention with every switch of the families.

Legend: B batch, T query positions, S slots of the cache, D embed, N query heads, K kv heads, H head_dim.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from lmjax.nn.cache import CacheWrite, LayerCache, appended
from lmjax.nn.execution import LayerExecution
from lmjax.nn.norm import Norm, NormKind
from lmjax.nn.param import Projection, constant
from lmjax.nn.position import Rope, Rotation
from lmjax.nn.tags import tag
from lmjax.ops.attention import attention
from lmjax.ops.attention_cached import cached_attention
from lmjax.ops.attention_mask import Mask


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What one attention is."""

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    rope: Rope | None
    slopes: tuple[float, ...] | None
    """Of ALiBi, one a head."""
    qk_norm: Literal["head", "full"] | None
    norm: NormKind
    norm_epsilon: float
    norm_unit_offset: bool
    query_scale: float
    softcap: float | None
    sinks: bool
    qkv_clip: float | None
    qkv_bias: bool
    out_bias: bool


class Rows(NamedTuple):
    """What a forward pass knows of its rows besides their activations."""

    positions_BT: Int[Array, "batch seq"]
    segment_ids_BT: Int[Array, "batch seq"] | None
    """None in generation, where positions tell what belongs together."""
    prefix_BT: Bool[Array, "batch seq"] | None
    """Tokens that all of their segment sees (prefix-LM); None: a token is seen by itself and later ones alone."""
    visits: Any = None
    """What ``lmjax.ops.attention.attention_visits`` found out of them for this kind of attention."""


class Attention(nnx.Module):
    """Multi-head, grouped-query (arXiv 2305.13245) or multi-query attention (arXiv 1911.02150)."""

    def __init__(self, options: AttentionOptions, *, output_std: float, key: PRNGKeyArray):
        self.options = options
        D, N, K, H = options.embed_dim, options.num_heads, options.num_kv_heads, options.head_dim
        q_key, k_key, v_key, out_key = jax.random.split(key, 4)

        def project(heads: int, axis: str, letter: str, key: PRNGKeyArray) -> Projection:
            return Projection(
                f"btd,d{letter}h->bt{letter}h",
                (D, heads, H),
                ("embed", axis, "head_dim"),
                ("batch", "seq", axis, "head_dim"),
                bias_axes=(axis, "head_dim") if options.qkv_bias else None,
                key=key,
            )

        def norm(heads: int, axis: str) -> Norm | None:
            if options.qk_norm is None:
                return None
            whole = options.qk_norm == "full"
            return Norm(
                options.norm,
                (heads, H) if whole else (H,),
                options.norm_epsilon,
                unit_offset=options.norm_unit_offset,
                axes=(axis, "head_dim") if whole else ("norm",),
            )

        self.query = project(N, "heads", "n", q_key)
        self.key = project(K, "kv_heads", "k", k_key)
        self.value = project(K, "kv_heads", "k", v_key)
        self.query_norm = norm(N, "heads")
        self.key_norm = norm(K, "kv_heads")
        self.sinks = constant(0.0, (N,), ("heads",)) if options.sinks else None
        self.out = out_projection(options, H, output_std, out_key)

    def __call__(
        self,
        x_BTD: Float[Array, "batch seq embed"],
        rows: Rows,
        rotation: Rotation | None,
        execution: LayerExecution,
        cache: LayerCache | None = None,
        write: CacheWrite | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], LayerCache | None]:
        """The output, and the cache with these tokens in it."""
        options = self.options
        q_BTNH, k_BTKH, v_BTKH = (project(x_BTD, execution) for project in (self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        if options.qkv_clip is not None:  # after the norms, as transformers' OlmoeAttention has it
            limit = options.qkv_clip
            q_BTNH, k_BTKH, v_BTKH = (jnp.clip(x, -limit, limit) for x in (q_BTNH, k_BTKH, v_BTKH))
        if options.rope is not None:
            assert rotation is not None
            q_BTNH, k_BTKH = options.rope.rotate(q_BTNH, rotation), options.rope.rotate(k_BTKH, rotation)
        sinks_N = None if self.sinks is None else self.sinks[...]
        out_BTNH, cache = attend(options, q_BTNH, k_BTKH, v_BTKH, sinks_N, rows, execution, cache, write)
        return self.out(out_BTNH, execution), cache


def out_projection(options: AttentionOptions, value_dim: int, std: float, key: PRNGKeyArray) -> Projection:
    """From what all heads found to the residual stream."""
    return Projection(
        "btnh,nhd->btd",
        (options.num_heads, value_dim, options.embed_dim),
        ("heads", "head_dim", "embed"),
        ("batch", "seq_residual", "embed"),
        bias_axes=("norm",) if options.out_bias else None,
        std=std,
        key=key,
    )


def attend(
    options: AttentionOptions,
    q_BTNH: Float[Array, "batch seq heads head_dim"],
    k_BTKH: Float[Array, "batch seq kv_heads head_dim"],
    v_BTKH: Float[Array, "batch seq kv_heads value_dim"],
    sinks_N: Float[Array, " heads"] | None,
    rows: Rows,
    execution: LayerExecution,
    cache: LayerCache | None,
    write: CacheWrite | None,
) -> tuple[Float[Array, "batch seq heads value_dim"], LayerCache | None]:
    """What the queries find among these keys, or with a cache among all that are in it; and the cache with these."""
    q_BTNH, k_BTKH, v_BTKH = tag(q_BTNH, "query"), tag(k_BTKH, "key"), tag(v_BTKH, "value")
    slopes_N = None if options.slopes is None else jnp.asarray(options.slopes, jnp.float32)
    if cache is None:
        out_BTNH = attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            mask=Mask(causal=True, window=options.window),
            segment_ids=rows.segment_ids_BT,
            prefix=rows.prefix_BT,
            slopes=slopes_N,
            sinks=sinks_N,
            visits=rows.visits,
            scale=options.query_scale,
            softcap=options.softcap,
            kernel=execution.attention_kernel,
            hardware=execution.hardware,
            save_as="attention_out",
        )
        return out_BTNH, None
    assert write is not None
    cache, here, key_positions_BS = appended(cache, k_BTKH, v_BTKH, write)
    out_BTNH = cached_attention(
        q_BTNH,
        *here,
        rows.positions_BT,
        key_positions_BS,
        slopes_N,
        sinks_N,
        window=options.window,
        scale=options.query_scale,
        softcap=options.softcap,
    )
    return out_BTNH, cache
