"""Qwen 3 with experts (transformers' Qwen3MoeForCausalLM): norms of each head's queries and keys, no shared expert."""

import dataclasses
from typing import Any

from lmjax.convert.activations import read_activation
from lmjax.convert.experts import read_experts, read_kinds, write_experts
from lmjax.convert.families import llama, qwen2_moe, qwen3
from lmjax.convert.rope import read_rope
from lmjax.convert.settings import Settings
from lmjax.convert.windows import read_windows
from lmjax.models.config import DecoderConfig


def read_config(settings: Settings) -> dict[str, Any]:
    settings.ignore("max_window_layers")  # of the dense models: here all layers have the window, or none
    settings.rename({"num_local_experts": "num_experts"})
    shared = llama.read_shared(
        settings,
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=24,
        num_key_value_heads=4,
        max_position_embeddings=32768,
    )
    num_layers = shared["num_layers"]
    experts = read_experts(
        settings,
        read_kinds(settings, num_layers),
        num_experts=settings.take("num_experts", 128),
        experts_per_token=settings.take("num_experts_per_tok", 8),
    )
    window = settings.take("sliding_window", 4096)
    window = window if settings.take("use_sliding_window", False) else None
    kind = "full_attention" if window is None else "sliding_attention"
    return {
        **shared,
        **experts,
        **read_rope(settings),
        **llama.read_biases(settings),
        **read_windows(settings, [kind] * num_layers, window),
        "activation": read_activation(settings, "hidden_act", "silu"),
        "qk_norm": "head",
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    return {
        **llama.write_shared(config),
        **write_experts(config),
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "head_dim": config.head_width,
        "attention_bias": config.qkv_bias,
    }


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=(*llama.BLOCK, *qwen3.QK_NORMS, *qwen2_moe.EXPERTS),
)
