"""Gemma 1 (transformers' GemmaForCausalLM): scales of norms are 1 + w, and embeddings are multiplied."""

import dataclasses
import math
from typing import Any

from lmjax.convert.families import llama
from lmjax.convert.rope import read_rope
from lmjax.convert.settings import Settings
from lmjax.models.config import DecoderConfig

ACTIVATION = "gelu_pytorch_tanh"


def read_shared(settings: Settings, **defaults: Any) -> dict[str, Any]:
    """The fields of Gemma 2 and 3 too, but rotary positions."""
    settings.expect("use_bidirectional_attention", None, False)
    shared = llama.read_shared(
        settings, **{"vocab_size": 256000, "head_dim": 256, "tie_word_embeddings": True, **defaults}
    )
    return {
        **shared,
        **llama.read_biases(settings),
        "norm_unit_offset": True,
        "activation": "gelu_tanh",
        "embed_multiplier": math.sqrt(shared["embed_dim"]),
    }


def write_shared(config: DecoderConfig) -> dict[str, Any]:
    return {**llama.write_shared(config), "head_dim": config.head_width, "attention_bias": config.qkv_bias}


def read_config(settings: Settings) -> dict[str, Any]:
    # The first published files say gelu and mean its approximation, as transformers knows.
    settings.expect("hidden_act", ACTIVATION, "gelu", default=ACTIVATION)
    settings.expect("hidden_activation", ACTIVATION, None)
    shared = read_shared(
        settings,
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=8192,
    )
    return {**shared, **read_rope(settings)}


def write_config(config: DecoderConfig) -> dict[str, Any]:
    return write_shared(config)


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="gemma",
    architecture="GemmaForCausalLM",
    read_config=read_config,
    write_config=write_config,
)
