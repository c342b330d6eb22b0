"""Phi-1, 1.5 and 2 (transformers' PhiForCausalLM)."""

from typing import Any

from lmjax.convert.activations import read_activation, write_activation
from lmjax.convert.families.gpt2 import BIASES, PLAIN
from lmjax.convert.families.gpt_neox import FIELDS
from lmjax.convert.family import Family, linear, norm, read_fields, write_fields
from lmjax.convert.rope import read_rope, write_rope
from lmjax.convert.settings import Settings
from lmjax.models.config import DecoderConfig

DEFAULTS = {
    "vocab_size": 51200,
    "max_position_embeddings": 2048,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "intermediate_size": 8192,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def read_config(settings: Settings) -> dict[str, Any]:
    settings.fill(DEFAULTS)
    settings.expect("qk_layernorm", False, default=False)
    return {
        **PLAIN,
        **BIASES,
        **read_fields(settings, FIELDS),
        **read_rope(settings, fraction=0.5),
        "num_kv_heads": settings.take("num_key_value_heads", None),
        "residual": "parallel_shared_norm",
        "activation": read_activation(settings, "hidden_act", "gelu_new"),
        "head_bias": True,
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    return {
        **write_fields(config, FIELDS),
        **write_rope(config),
        "partial_rotary_factor": config.rope_fraction,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": write_activation(config.activation, "gelu_new"),
    }


FAMILY = Family(
    model_type="phi",
    architecture="PhiForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=(
        norm("attention_norm", "input_layernorm"),
        linear("attention/query", "self_attn.q_proj"),
        linear("attention/key", "self_attn.k_proj"),
        linear("attention/value", "self_attn.v_proj"),
        linear("attention/out", "self_attn.dense"),
        linear("mlp/up", "mlp.fc1"),
        linear("mlp/down", "mlp.fc2"),
    ),
    layer="model.layers.{}",
    embed="model.embed_tokens",
    final_norm="model.final_layernorm",
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
