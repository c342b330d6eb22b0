"""Mistral 7B and Nemo (transformers' MistralForCausalLM): Llama with windows, in all layers or in none."""

import dataclasses
from typing import Any

from lmjax.convert.activations import read_activation
from lmjax.convert.families import llama
from lmjax.convert.rope import read_rope
from lmjax.convert.settings import Settings
from lmjax.convert.windows import read_windows
from lmjax.models.config import DecoderConfig


def read_config(settings: Settings) -> dict[str, Any]:
    shared = llama.read_shared(
        settings, intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=4096 * 32
    )
    window = settings.take("sliding_window", 4096)
    kind = "full_attention" if window is None else "sliding_attention"
    return {
        **shared,
        **read_rope(settings),
        **read_windows(settings, [kind] * shared["num_layers"], window),
        "activation": read_activation(settings, "hidden_act", "silu"),
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    return {**llama.write_shared(config), "sliding_window": config.sliding_window}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="mistral",
    architecture="MistralForCausalLM",
    read_config=read_config,
    write_config=write_config,
)
