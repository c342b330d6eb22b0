"""Qwen 1.5, 2 and 2.5 (transformers' Qwen2ForCausalLM): Llama with biases of queries, keys and values."""

import dataclasses
from typing import Any

from lmjax.convert.activations import read_activation
from lmjax.convert.families import llama
from lmjax.convert.rope import read_rope
from lmjax.convert.settings import Settings
from lmjax.convert.windows import read_windows, write_layer_types
from lmjax.models.config import DecoderConfig

DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}


def read_layers(settings: Settings, num_layers: int) -> dict[str, Any]:
    """Without ``layer_types``, the layers from ``max_window_layers`` on have the window, where it is used at all."""
    window, first = settings.take("sliding_window", 4096), settings.take("max_window_layers", 28)
    if not settings.take("use_sliding_window", False):
        window, first = None, num_layers
    kinds = ["full_attention" if layer < first else "sliding_attention" for layer in range(num_layers)]
    return read_windows(settings, kinds, window)


def write_layers(config: DecoderConfig) -> dict[str, Any]:
    if config.sliding_window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    return {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "layer_types": write_layer_types(config),
    }


def read_config(settings: Settings) -> dict[str, Any]:
    settings.expect("use_mrope", False, default=False)
    shared = llama.read_shared(settings, **DEFAULTS)
    return {
        **shared,
        **read_rope(settings),
        **read_layers(settings, shared["num_layers"]),
        "activation": read_activation(settings, "hidden_act", "silu"),
        "qkv_bias": True,
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    return {**llama.write_shared(config), **write_layers(config)}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    read_config=read_config,
    write_config=write_config,
)
