"""GPT-2 (transformers' GPT2LMHeadModel)."""

from typing import Any

from lmjax.convert.activations import read_activation, write_activation
from lmjax.convert.family import CONV1D, CONV1D_OUT, QKV, Family, Part, norm, read_fields, write_fields
from lmjax.convert.settings import Settings
from lmjax.models.config import DecoderConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "max_length": "n_positions",
    "embed_dim": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "norm_epsilon": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}
SIZES = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
DEFAULTS = SIZES | {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
"""What the keys mean where a file lacks them."""
OTHER_NAMES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
}
PLAIN = {"norm": "layer", "norm_bias": True, "mlp_gated": False, "mlp_bias": True}
BIASES = {"qkv_bias": True, "attention_out_bias": True}
SUMMARY = tuple(f"summary_{key}" for key in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj"))
UNUSED = (*SUMMARY, "_num_labels", "n_ctx", "n_special", "output_past", "predict_special_tokens")
"""Of heads that are not a language model's, and of older versions."""


def read_shared(settings: Settings, *, activation: str, **defaults: Any) -> dict[str, Any]:
    """The fields of GPT-2's relatives too, which have other ``defaults``, and ``activation`` as theirs."""
    settings.ignore(*UNUSED)
    settings.rename(OTHER_NAMES)
    settings.fill(DEFAULTS | defaults)
    settings.expect("add_cross_attention", False, default=False)
    fields = read_fields(settings, FIELDS)
    return {
        **PLAIN,
        **fields,
        "mlp_dim": settings.take("n_inner", None) or 4 * fields["embed_dim"],
        "activation": read_activation(settings, "activation_function", activation),
    }


def write_shared(config: DecoderConfig, *, activation: str) -> dict[str, Any]:
    return {
        **write_fields(config, FIELDS),
        "n_inner": config.mlp_dim,
        "activation_function": write_activation(config.activation, activation),
    }


def read_scale(settings: Settings) -> dict[str, Any]:
    return {"query_scale": None if settings.take("scale_attn_weights", True) else 1.0}


def write_scale(config: DecoderConfig) -> dict[str, Any]:
    return {"scale_attn_weights": config.query_scale != 1.0}


def read_config(settings: Settings) -> dict[str, Any]:
    settings.expect("scale_attn_by_inverse_layer_idx", False, default=False)
    # Scores are always computed in float32 here.
    settings.ignore("reorder_and_upcast_attn")
    shared = read_shared(settings, activation="gelu_new")
    return {**shared, **BIASES, **read_scale(settings), "position": "learned"}


def write_config(config: DecoderConfig) -> dict[str, Any]:
    return {**write_shared(config, activation="gelu_new"), **write_scale(config)}


FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    read_config=read_config,
    write_config=write_config,
    block=(
        norm("attention_norm", "ln_1"),
        Part("attn.c_attn", QKV, CONV1D),
        Part("attn.c_proj", ("attention/out",), CONV1D_OUT),
        norm("mlp_norm", "ln_2"),
        Part("mlp.c_fc", ("mlp/up",), CONV1D),
        Part("mlp.c_proj", ("mlp/down",), CONV1D),
    ),
    layer="transformer.h.{}",
    embed="transformer.wte",
    position="transformer.wpe",
    final_norm="transformer.ln_f",
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
)
