"""OPT, but for its 350M model, which norms after its branches (transformers' OPTForCausalLM)."""

from typing import Any

from lmjax.convert.activations import read_activation, write_activation
from lmjax.convert.families.gpt2 import BIASES, PLAIN
from lmjax.convert.family import Family, linear, norm, read_fields, write_fields
from lmjax.convert.settings import Settings
from lmjax.models.config import DecoderConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "max_length": "max_position_embeddings",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_dim": "ffn_dim",
    "tie_embeddings": "tie_word_embeddings",
}
DEFAULTS = {
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "ffn_dim": 3072,
    "tie_word_embeddings": True,
}


def read_config(settings: Settings) -> dict[str, Any]:
    settings.ignore("init_std")
    settings.fill(DEFAULTS)
    settings.expect("do_layer_norm_before", True, default=True)
    settings.expect("_remove_final_layer_norm", False, default=False)
    settings.expect("layer_norm_elementwise_affine", True, default=True)
    fields = read_fields(settings, FIELDS)
    settings.expect("word_embed_proj_dim", None, fields["embed_dim"])
    bias = settings.take("enable_bias", True)
    return {
        **PLAIN,
        **fields,
        **dict.fromkeys((*BIASES, "mlp_bias"), bias),
        "norm_epsilon": 1e-5,
        "activation": read_activation(settings, "activation_function", "relu"),
        "position": "learned",
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    return {
        **write_fields(config, FIELDS),
        "word_embed_proj_dim": config.embed_dim,
        "activation_function": write_activation(config.activation),
        "enable_bias": config.qkv_bias,
    }


FAMILY = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=(
        norm("attention_norm", "self_attn_layer_norm"),
        linear("attention/query", "self_attn.q_proj"),
        linear("attention/key", "self_attn.k_proj"),
        linear("attention/value", "self_attn.v_proj"),
        linear("attention/out", "self_attn.out_proj"),
        norm("mlp_norm", "final_layer_norm"),
        linear("mlp/up", "fc1"),
        linear("mlp/down", "fc2"),
    ),
    layer="model.decoder.layers.{}",
    embed="model.decoder.embed_tokens",
    position="model.decoder.embed_positions",
    position_offset=2,
    final_norm="model.decoder.final_layer_norm",
)
