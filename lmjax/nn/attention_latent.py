"""Multi-head latent attention: the keys and values of all heads are made of one narrow vector a token.

Legend: B batch, T positions, D embed, N heads; H width of queries and keys, of which the last R dimensions are rotated
and the first P are not; V width of values, C width of the latent vector.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from lmjax.nn.attention import AttentionOptions, Rows, attend, out_projection
from lmjax.nn.cache import CacheWrite, LayerCache
from lmjax.nn.execution import LayerExecution
from lmjax.nn.norm import Norm
from lmjax.nn.param import Projection, constant
from lmjax.nn.position import Rotation
from lmjax.ops.projection import project
from lmjax.schema import config_class
from lmjax.sharding import activation_spec


@config_class
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    kv_rank: int
    """Width of the vector that the keys and values of all heads are made of; a cache has nothing else but one rotated
    key."""
    query_rank: int | None = None
    """Width of the vector that queries are made of; null makes them of the residual stream itself."""
    rope_dim: int
    """Dimensions of a head that are rotated, of head_dim the last ones; a key has the same ones in all heads."""
    value_dim: int
    """Width of a head's values."""
    norm_epsilon: float = 1e-6
    """Added to the mean square in the norms of the narrow vectors."""

    def __post_init__(self) -> None:
        for name in ("kv_rank", "query_rank", "rope_dim", "value_dim", "norm_epsilon"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it has to be above 0")


class LatentAttention(nnx.Module):
    """DeepSeek-V2's and V3's attention (arXiv 2405.04434, equations 9 to 19; transformers' DeepseekV3Attention)."""

    def __init__(self, options: AttentionOptions, latent: LatentConfig, *, output_std: float, key: PRNGKeyArray):
        assert options.rope is not None
        assert options.rope.width == latent.rope_dim
        self.options = options
        self.latent = latent
        D, N, H, R, C, V = (
            options.embed_dim,
            options.num_heads,
            options.head_dim,
            latent.rope_dim,
            latent.kv_rank,
            latent.value_dim,
        )
        q_down_key, q_up_key, kv_down_key, rope_key, k_up_key, v_up_key, out_key = jax.random.split(key, 7)

        def down(width: int, key: PRNGKeyArray) -> Projection:
            return Projection("btd,dc->btc", (D, width), ("embed", "latent"), ("batch", "seq", "latent"), key=key)

        def heads(inputs: int, axis: str, width: int, key: PRNGKeyArray) -> Projection:
            return Projection(
                "btc,cnh->btnh",
                (inputs, N, width),
                (axis, "heads", "head_dim"),
                ("batch", "seq", "heads", "head_dim"),
                key=key,
            )

        def norm(width: int) -> Norm:
            return Norm("rms", (width,), latent.norm_epsilon)

        rank = latent.query_rank
        self.query_down = None if rank is None else down(rank, q_down_key)
        self.query_norm = None if rank is None else norm(rank)
        self.query_up = None if rank is None else heads(rank, "latent_in", H, q_up_key)
        self.query = heads(D, "embed", H, q_up_key) if rank is None else None
        self.kv_down = down(C, kv_down_key)
        self.key_rope = down(R, rope_key)
        self.kv_norm = norm(C)
        self.key_up = heads(C, "latent_in", H - R, k_up_key)
        self.value_up = heads(C, "latent_in", V, v_up_key)
        self.sinks = constant(0.0, (N,), ("heads",)) if options.sinks else None
        self.out = out_projection(options, V, output_std, out_key)

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
        rope = self.options.rope
        assert rope is not None
        assert rotation is not None
        q_BTNH = self._queries(x_BTD, execution)
        q_BTNP, q_BTNR = q_BTNH[..., : -rope.width], rope.rotate(q_BTNH[..., -rope.width :], rotation)
        latent_BTC = self.kv_norm(self.kv_down(x_BTD, execution))
        k_BT1R = rope.rotate(self.key_rope(x_BTD, execution)[:, :, None], rotation)
        sinks_N = None if self.sinks is None else self.sinks[...]
        if cache is None:
            k_BTNP, v_BTNV = self.key_up(latent_BTC, execution), self.value_up(latent_BTC, execution)
            k_BTNR = jnp.broadcast_to(k_BT1R, (*k_BTNP.shape[:3], rope.width))
            k_BTNR = jax.sharding.reshard(k_BTNR, jax.typeof(k_BTNP).sharding.spec)
            q_BTNH, k_BTNH = _joined(q_BTNP, q_BTNR), _joined(k_BTNP, k_BTNR)
            out_BTNV, _ = attend(self.options, q_BTNH, k_BTNH, v_BTNV, sinks_N, rows, execution, None, None)
        else:
            # q . (C x P matrix) latent = (q matrix) . latent: all heads look for one key of C + R dimensions, and find
            # latent vectors, of which their values are made (section 2.1.2). Nothing of the width of the heads is kept.
            q_BTNC = self._per_head("btnp,cnp->btnc", q_BTNP, self.key_up, execution)
            latent_BT1C = latent_BTC[:, :, None]
            k_BT1H, v_BT1C = _one_head(_joined(latent_BT1C, k_BT1R)), _one_head(latent_BT1C)
            q_BTNH = _joined(q_BTNC, q_BTNR)
            found_BTNC, cache = attend(self.options, q_BTNH, k_BT1H, v_BT1C, sinks_N, rows, execution, cache, write)
            out_BTNV = self._per_head("btnc,cnv->btnv", found_BTNC, self.value_up, execution)
        return self.out(out_BTNV, execution), cache

    def _queries(self, x_BTD: jax.Array, execution: LayerExecution) -> Float[Array, "batch seq heads head_dim"]:
        if self.query is not None:
            return self.query(x_BTD, execution)
        assert self.query_down is not None
        assert self.query_norm is not None
        assert self.query_up is not None
        return self.query_up(self.query_norm(self.query_down(x_BTD, execution)), execution)

    def _per_head(self, equation: str, x_BTNH: jax.Array, up: Projection, execution: LayerExecution) -> jax.Array:
        """Each head's part of x with its part of the projection."""
        kernel = up.kernel[...]
        B, T, N, _ = x_BTNH.shape
        width = kernel.shape[0] if equation.endswith("c") else kernel.shape[2]
        spec = activation_spec(("batch", "seq", "heads", "head_dim"), (B, T, N, width))
        x_BTNH = jax.sharding.reshard(x_BTNH, spec)
        return project(equation, x_BTNH, kernel, spec, reduce_f32=execution.reduce_in_float32)


def _one_head(x_BT1H: jax.Array) -> jax.Array:
    """Sharded as the keys and values of other attention are."""
    return jax.sharding.reshard(x_BT1H, activation_spec(("batch", "seq", "kv_heads", "head_dim"), x_BT1H.shape))


def _joined(first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.concatenate([first, second], axis=-1)
