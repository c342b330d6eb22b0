"""What a table of a family says, and the settings that transformers' families have in common."""

import dataclasses
from collections.abc import Callable
from typing import Any

from lmjax.models.decoder import DecoderConfig
from tests.models.families.names import Names

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}

SCALING_KEYS = {
    "original_length": "original_max_position_embeddings",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "short_factors": "short_factor",
    "long_factors": "long_factor",
}
"""Our fields of a scaling to their names in transformers, where they differ."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A tiny decoder of a family, its twin in transformers, and how to tell that the two are compared at all."""

    config: DecoderConfig
    model: Callable[[DecoderConfig], Any]
    """The transformers model of a config of this family."""
    names: Names
    wrong: dict[str, Any]
    """Changes to the config with which transformers' logits differ, the parameters being the same."""
    perturbed: str
    """The end of the names of the tensors whose signs, when turned, change the logits too."""
    grid: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Further configs of the family, by name, as changes to the first one."""
    length: int = 13


def tiny_config(**fields: Any) -> DecoderConfig:
    sizes = {"vocab_size": 91, "max_length": 32, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "mlp_dim": 48}
    return DecoderConfig(**(sizes | fields))


def rope_parameters(config: DecoderConfig, theta: float | None = None) -> dict[str, Any]:
    """The entry ``rope_parameters`` of a transformers config; ``theta`` is that of blocks without a scaling."""
    if theta is not None:
        return {"rope_type": "default", "rope_theta": theta}
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_fraction != 1:
        parameters["partial_rotary_factor"] = config.rope_fraction
    if config.rope_scaling is not None:
        for field in dataclasses.fields(config.rope_scaling):
            value = getattr(config.rope_scaling, field.name)
            if value is not None:
                name = "rope_type" if field.name == "kind" else SCALING_KEYS.get(field.name, field.name)
                parameters[name] = list(value) if isinstance(value, tuple) else value
    if parameters["rope_type"] == "dynamic":  # it takes the length from max_position_embeddings
        del parameters["original_max_position_embeddings"]
    return parameters


def max_positions(config: DecoderConfig) -> int:
    """``max_position_embeddings``; with dynamic scaling, transformers takes it for the length that was trained on."""
    scaling = config.rope_scaling
    return scaling.original_length if scaling is not None and scaling.kind == "dynamic" else config.max_length


def layer_types(config: DecoderConfig) -> list[str]:
    return [f"{kind.attention}_attention" for kind in config.blocks]


def rms_settings(config: DecoderConfig) -> dict[str, Any]:
    """The settings that Llama's relatives share."""
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": max_positions(config),
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": rope_parameters(config),
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }


def gpt_settings(config: DecoderConfig) -> dict[str, Any]:
    """The settings that GPT-2's relatives share."""
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "n_embd": config.embed_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_dim,
        "activation_function": ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": config.tie_embeddings,
        "attn_implementation": "eager",
    }
