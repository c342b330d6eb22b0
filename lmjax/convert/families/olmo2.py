"""OLMo 2 (transformers' Olmo2ForCausalLM): norms after each branch, and of all queries and all keys together."""

import dataclasses
from typing import Any

from lmjax.convert.activations import read_activation
from lmjax.convert.families import llama, qwen3
from lmjax.convert.family import norm
from lmjax.convert.rope import read_rope
from lmjax.convert.settings import Settings
from lmjax.models.config import DecoderConfig


def read_config(settings: Settings) -> dict[str, Any]:
    return {
        **llama.read_shared(settings, vocab_size=50304, rms_norm_eps=1e-5),
        **read_rope(settings),
        **llama.read_biases(settings),
        "activation": read_activation(settings, "hidden_act", "silu"),
        "norm_placement": "post",
        "qk_norm": "full",
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    return {**llama.write_shared(config), "attention_bias": config.qkv_bias}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=(
        *(part for part in llama.BLOCK if not part.ours[0].endswith("_norm")),
        *qwen3.QK_NORMS,
        norm("attention_post_norm", "post_attention_layernorm"),
        norm("mlp_post_norm", "post_feedforward_layernorm"),
    ),
)
