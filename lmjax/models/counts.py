"""Parameters and floating-point operations of a decoder, in closed form."""

from lmjax.models.decoder import DecoderConfig


def parameter_count(config: DecoderConfig) -> int:
    """Parameters as published: the vocabulary's rows without padding, a tied table once."""
    tables = 1 if config.tie_embeddings else 2
    norms = config.embed_dim * (2 * config.num_layers + 1)
    return tables * config.vocab_size * config.embed_dim + norms + config.num_layers * _block_matrices(config)


def training_flops(config: DecoderConfig, batch_size: int, length: int) -> int:
    """Floating-point operations of one training step on ``batch_size`` rows of ``length`` tokens.

    Forward and twice as much backward. Counted are the matrix products (2 per multiply-add) of projections, MLPs, the
    logits and attention; of attention only the keys that a position may see (causal: half; sliding: the window). Not
    counted: recomputation, the embedding lookup, norms, softmax, the optimizer. Segments are not taken into account.

    MFU (PaLM, arXiv 2204.02311 appendix B) is this, divided by the seconds of the step and the dense bfloat16 peak of
    all devices, whatever dtype is computed in.
    """
    matrices = config.num_layers * _block_matrices(config) + config.vocab_size * config.embed_dim
    per_key = 2 * 2 * config.num_heads * config.head_width  # scores and weighted values
    keys = 0
    for segment in config.segments:
        for kind in segment.pattern:
            keys += segment.repeats * _visible_keys(length, config.window(kind))
    return 3 * batch_size * (2 * matrices * length + per_key * keys)


def _visible_keys(length: int, window: int | None) -> int:
    """Pairs (query, key) of a sequence that causal attention looks at."""
    window = length if window is None else min(window, length)
    return window * (window + 1) // 2 + (length - window) * window


def _block_matrices(config: DecoderConfig) -> int:
    attention = config.embed_dim * config.head_width * (2 * config.num_heads + 2 * config.kv_heads)
    return attention + 3 * config.embed_dim * config.mlp_dim
