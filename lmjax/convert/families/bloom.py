"""BLOOM (transformers' BloomForCausalLM)."""

from typing import Any

from lmjax.convert.families.gpt2 import BIASES, PLAIN
from lmjax.convert.family import GROUPED, QKV, Family, Part, linear, norm, read_fields, write_fields
from lmjax.convert.settings import Settings
from lmjax.models.config import DecoderConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "max_length": "seq_length",
    "norm_epsilon": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}
DEFAULTS = {
    "vocab_size": 250880,
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 8,
    "seq_length": 2048,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
"""transformers' own, with the length of all published models, which few of their files say."""
OTHER_NAMES = {"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
UNUSED = (
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "n_inner",
    "offset_alibi",
    "skip_bias_add",
    "skip_bias_add_qkv",
)
"""Of the code that the published models were trained with."""
BRANCHES = (
    Part("self_attention.query_key_value", QKV, GROUPED),
    linear("attention/out", "self_attention.dense"),
    linear("mlp/up", "mlp.dense_h_to_4h"),
    linear("mlp/down", "mlp.dense_4h_to_h"),
)


def read_config(settings: Settings) -> dict[str, Any]:
    settings.ignore(*UNUSED)
    settings.rename(OTHER_NAMES)
    settings.fill(DEFAULTS)
    settings.expect("apply_residual_connection_post_layernorm", False, default=False)
    # With parts of pretraining_tp, transformers then leaves out the biases of the output projections.
    settings.expect("slow_but_exact", False, default=False)
    fields = read_fields(settings, FIELDS)
    return {
        **PLAIN,
        **BIASES,
        **fields,
        "mlp_dim": 4 * fields["embed_dim"],
        "embed_norm": True,
        "activation": "gelu_tanh",
        "position": "alibi",
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    return write_fields(config, FIELDS)


FAMILY = Family(
    model_type="bloom",
    architecture="BloomForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=(norm("attention_norm", "input_layernorm"), norm("mlp_norm", "post_attention_layernorm"), *BRANCHES),
    layer="transformer.h.{}",
    embed="transformer.word_embeddings",
    embed_norm="transformer.word_embeddings_layernorm",
    final_norm="transformer.ln_f",
)
