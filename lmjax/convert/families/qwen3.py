"""Qwen 3, its dense models (transformers' Qwen3ForCausalLM): norms of each head's queries and keys."""

import dataclasses
from typing import Any

from lmjax.convert.activations import read_activation
from lmjax.convert.families import llama, qwen2
from lmjax.convert.family import norm
from lmjax.convert.rope import read_rope
from lmjax.convert.settings import Settings
from lmjax.models.config import DecoderConfig

QK_NORMS = (norm("attention/query_norm", "self_attn.q_norm"), norm("attention/key_norm", "self_attn.k_norm"))


def read_config(settings: Settings) -> dict[str, Any]:
    shared = llama.read_shared(settings, **qwen2.DEFAULTS, head_dim=128)
    return {
        **shared,
        **read_rope(settings),
        **llama.read_biases(settings),
        **qwen2.read_layers(settings, shared["num_layers"]),
        "activation": read_activation(settings, "hidden_act", "silu"),
        "qk_norm": "head",
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    return {
        **llama.write_shared(config),
        **qwen2.write_layers(config),
        "head_dim": config.head_width,
        "attention_bias": config.qkv_bias,
    }


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=(*llama.BLOCK, *QK_NORMS),
)
