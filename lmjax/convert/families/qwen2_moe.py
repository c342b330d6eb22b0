"""Qwen 1.5 and 2 with experts (transformers' Qwen2MoeForCausalLM): beside them an MLP that all tokens share."""

import dataclasses
from typing import Any

from lmjax.convert.activations import read_activation
from lmjax.convert.experts import expert_parts, moe_of, read_experts, read_kinds, write_experts
from lmjax.convert.families import llama, qwen2
from lmjax.convert.family import linear
from lmjax.convert.rope import read_rope
from lmjax.convert.settings import Settings
from lmjax.convert.windows import read_windows
from lmjax.models.config import DecoderConfig

EXPERTS = expert_parts("mlp", gate="gate_proj", up="up_proj", down="down_proj")
SHARED = (
    *(linear(f"moe/shared/{name}", f"mlp.shared_expert.{name}_proj") for name in ("gate", "up", "down")),
    linear("moe/shared_gate", "mlp.shared_expert_gate"),
)


def read_config(settings: Settings) -> dict[str, Any]:
    shared = llama.read_shared(
        settings,
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5632,
        moe_intermediate_size=1408,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=32768,
    )
    experts = read_experts(
        settings,
        read_kinds(settings, shared["num_layers"]),
        num_experts=settings.take("num_experts", 60),
        experts_per_token=settings.take("num_experts_per_tok", 4),
        shared_dim=settings.take("shared_expert_intermediate_size", 5632),
        shared_gate=True,
    )
    return {
        **shared,
        **experts,
        **read_rope(settings),
        **_read_layers(settings, shared["num_layers"]),
        "activation": read_activation(settings, "hidden_act", "silu"),
        "qkv_bias": settings.take("qkv_bias", True),
    }


def _read_layers(settings: Settings, num_layers: int) -> dict[str, Any]:
    """Without ``layer_types``, every second one of the first ``max_window_layers`` has the window."""
    window, last = settings.take("sliding_window", 4096), settings.take("max_window_layers", 28)
    if not settings.take("use_sliding_window", False):
        window, last = None, 0
    kinds = ["sliding_attention" if i < last and not i % 2 else "full_attention" for i in range(num_layers)]
    return read_windows(settings, kinds, window)


def write_config(config: DecoderConfig) -> dict[str, Any]:
    keys = {**llama.write_shared(config), **qwen2.write_layers(config), **write_experts(config)}
    return {**keys, "qkv_bias": config.qkv_bias, "shared_expert_intermediate_size": moe_of(config).shared_dim or 0}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=(*llama.BLOCK, *EXPERTS, *SHARED),
)
