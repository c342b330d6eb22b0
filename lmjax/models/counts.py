"""Parameters and floating-point operations of a decoder, in closed form."""

from typing import NamedTuple

from lmjax.models.config import BlockKind, DecoderConfig


def parameter_count(config: DecoderConfig, *, active: bool = False) -> int:
    """Parameters as published: tables without padding rows, a tied table once.

    ``active``: those that a token goes through, of the experts as many as it chooses.
    """
    D, norm = config.embed_dim, config.embed_dim * (2 if config.norm_bias else 1)
    tables = (1 if config.tie_embeddings else 2) * config.vocab_size * D
    tables += config.max_length * D if config.position == "learned" else 0
    tables += config.vocab_size if config.head_bias else 0
    norms_outside = 2 if config.embed_norm else 1
    block = _attention_matrices(config) + _biases(config) + _norms_of_block(config) * norm + _head_scales(config)
    feed_forward = sum(_feed_forward(config, kind, active=active) for kind in config.blocks)
    if config.moe is not None and config.moe.choice_bias_rate is not None:
        feed_forward += config.moe.num_experts * sum(kind.mlp == "moe" for kind in config.blocks)
    return tables + norms_outside * norm + config.num_layers * block + feed_forward


def training_flops(config: DecoderConfig, batch_size: int, length: int) -> int:
    """Floating-point operations of one training step on ``batch_size`` rows of ``length`` tokens.

    Forward and twice as much backward. Counted are the matrix products (2 per multiply-add) of projections, MLPs, the
    router, as many experts as a token goes through, the logits and attention; of attention only the keys that a
    position may see (causal: half; sliding: the window). Not counted: recomputation, the embedding lookup, norms,
    softmax, the optimizer. Segments are not taken into account.

    MFU (PaLM, arXiv 2204.02311 appendix B) is this, divided by the seconds of the step and the dense bfloat16 peak of
    all devices, whatever dtype is computed in.
    """
    forward = 2 * length * config.vocab_size * config.embed_dim
    for segment in config.segments:
        for kind in segment.pattern:
            products = 2 * length * sum(block_products(config, kind))
            forward += segment.repeats * (products + attention_flops(config, kind, length))
    return 3 * batch_size * forward


def attention_flops(config: DecoderConfig, kind: BlockKind, length: int) -> int:
    """Operations of a block's attention for one row, forward: scores and weighted values."""
    per_key = 2 * config.num_heads * (config.head_width + config.value_width)
    return per_key * _visible_keys(length, config.window(kind.attention))


class Products(NamedTuple):
    """Multiply-adds of a token in the matrix products of a block."""

    inputs: int
    """Of attention: queries, keys and values."""
    output: int
    """Of attention."""
    router: int
    hidden: int
    """What is activated, and what that is multiplied with; of all experts that a token goes through."""
    down: int


def block_products(config: DecoderConfig, kind: BlockKind) -> Products:
    """Of a block's forward pass."""
    output = config.embed_dim * config.num_heads * config.value_width
    feed_forward = _feed_forward(config, kind, active=True)
    router = config.embed_dim * config.moe.num_experts if kind.mlp == "moe" and config.moe is not None else 0
    gate = config.embed_dim if kind.mlp == "moe" and config.moe is not None and config.moe.shared_gate else 0
    down = (feed_forward - router - gate) // (3 if config.mlp_gated else 2)
    return Products(
        inputs=_attention_matrices(config) - output,
        output=output,
        router=router + gate,
        hidden=feed_forward - router - gate - down,
        down=down,
    )


def _visible_keys(length: int, window: int | None) -> int:
    """Pairs (query, key) of a sequence that causal attention looks at."""
    window = length if window is None else min(window, length)
    return window * (window + 1) // 2 + (length - window) * window


def _attention_matrices(config: DecoderConfig) -> int:
    D, N, H = config.embed_dim, config.num_heads, config.head_width
    if (latent := config.latent) is None:
        return D * H * (2 * N + 2 * config.kv_heads)
    queries = D * N * H if latent.query_rank is None else latent.query_rank * (D + N * H)
    keys = D * (latent.kv_rank + latent.rope_dim) + latent.kv_rank * N * (H - latent.rope_dim)
    return queries + keys + (latent.kv_rank + D) * N * latent.value_dim


def _feed_forward(config: DecoderConfig, kind: BlockKind, *, active: bool) -> int:
    """Parameters of a block's feed-forward half but biases and norms: for a token, multiply-adds too."""
    per_width = (3 if config.mlp_gated else 2) * config.embed_dim
    if kind.mlp == "dense":
        return per_width * config.mlp_dim
    moe = config.moe
    assert moe is not None
    experts = moe.experts_per_token if active else moe.num_experts
    shared = per_width * (moe.shared_dim or 0) + (config.embed_dim if moe.shared_gate else 0)
    return experts * per_width * config.expert_dim + shared + config.embed_dim * moe.num_experts


def _biases(config: DecoderConfig) -> int:
    biases = config.head_width * (config.num_heads + 2 * config.kv_heads) if config.qkv_bias else 0
    biases += config.embed_dim if config.attention_out_bias else 0
    hidden = config.mlp_dim * (2 if config.mlp_gated else 1)
    return biases + (hidden + config.embed_dim if config.mlp_bias else 0)


def _norms_of_block(config: DecoderConfig) -> int:
    if config.residual == "parallel_shared_norm":
        return 1
    return 4 if config.norm_placement == "sandwich" else 2


def _head_scales(config: DecoderConfig) -> int:
    """Norms of queries and keys, or of the vectors that these are made of, and sinks."""
    if (latent := config.latent) is not None:
        scales = latent.kv_rank + (latent.query_rank or 0)
    else:
        heads = {None: 0, "head": 2, "full": config.num_heads + config.kv_heads}[config.qk_norm]
        scales = heads * config.head_width
    return scales + (config.num_heads if config.attention_sinks else 0)
