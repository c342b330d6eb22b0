"""Llama 1 to 3.x and what is published as Llama, such as SmolLM2 (transformers' LlamaForCausalLM)."""

from typing import Any

from lmjax.convert.activations import read_activation, write_activation
from lmjax.convert.family import Family, linear, norm, read_fields, write_fields
from lmjax.convert.rope import read_rope, write_rope
from lmjax.convert.settings import Settings
from lmjax.models.config import DecoderConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "max_length": "max_position_embeddings",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "intermediate_size",
    "norm_epsilon": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
DEFAULTS = {
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": 11008,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
"""What the keys mean where a file lacks them."""
BLOCK = (
    norm("attention_norm", "input_layernorm"),
    linear("attention/query", "self_attn.q_proj"),
    linear("attention/key", "self_attn.k_proj"),
    linear("attention/value", "self_attn.v_proj"),
    linear("attention/out", "self_attn.o_proj"),
    norm("mlp_norm", "post_attention_layernorm"),
    linear("mlp/gate", "mlp.gate_proj"),
    linear("mlp/up", "mlp.up_proj"),
    linear("mlp/down", "mlp.down_proj"),
)


def read_shared(settings: Settings, **defaults: Any) -> dict[str, Any]:
    """The fields of Llama's relatives too, but rotary positions; they have other ``defaults``."""
    settings.fill(DEFAULTS | defaults)
    return {
        **read_fields(settings, FIELDS),
        "num_kv_heads": settings.take("num_key_value_heads"),
        "head_dim": settings.take("head_dim"),
    }


def write_shared(config: DecoderConfig) -> dict[str, Any]:
    own = {} if config.head_width * config.num_heads == config.embed_dim else {"head_dim": config.head_width}
    return {
        **write_fields(config, FIELDS),
        **write_rope(config),
        **own,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": write_activation(config.activation),
    }


def read_biases(settings: Settings) -> dict[str, bool]:
    """``attention_bias`` is that of all four projections."""
    bias = settings.take("attention_bias", False)
    return {"qkv_bias": bias, "attention_out_bias": bias}


def read_config(settings: Settings) -> dict[str, Any]:
    settings.ignore("max_sequence_length", "is_llama_config")  # of the first Llama and of SmolLM2; nothing reads them
    settings.expect("rope_interleaved", False, default=False)
    return {
        **read_shared(settings),
        **read_rope(settings),
        **read_biases(settings),
        "activation": read_activation(settings, "hidden_act", "silu"),
        "mlp_bias": settings.take("mlp_bias", False),
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    return {**write_shared(config), "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=BLOCK,
    layer="model.layers.{}",
    embed="model.embed_tokens",
    final_norm="model.norm",
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
