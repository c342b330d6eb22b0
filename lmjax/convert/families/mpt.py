"""MPT (transformers' MptForCausalLM, which has fewer options than the code that it was published with)."""

from typing import Any

from lmjax.convert.family import LINEAR, QKV, Family, Part, linear, norm, read_fields, write_fields
from lmjax.convert.settings import Settings
from lmjax.models.config import DecoderConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "max_length": "max_seq_len",
    "embed_dim": "d_model",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "norm_epsilon": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}
DEFAULTS = {
    "vocab_size": 50368,
    "max_seq_len": 2048,
    "d_model": 2048,
    "n_layers": 24,
    "n_heads": 16,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
OTHER_NAMES = {"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
UNUSED = ("fc_type", "init_config", "init_device", "learned_pos_emb", "tokenizer_name", "verbose")
"""How a model was made; positions are told by ALiBi alone."""


def read_config(settings: Settings) -> dict[str, Any]:
    settings.ignore(*UNUSED)
    settings.rename(OTHER_NAMES)
    settings.fill(DEFAULTS)
    settings.expect("expansion_ratio", 4, default=4)
    settings.expect("no_bias", True, default=True)
    settings.expect("logit_scale", None)
    settings.expect("embedding_fraction", 1, default=1)
    settings.expect("norm_type", "low_precision_layernorm", "layernorm", default="layernorm")
    fields = read_fields(settings, FIELDS)
    return {
        **fields,
        "mlp_dim": 4 * fields["embed_dim"],
        "norm": "layer",
        "mlp_gated": False,
        "activation": "gelu",
        "position": "alibi",
        **_read_attention(settings),
    }


def _read_attention(settings: Settings) -> dict[str, Any]:
    attention = settings.inside("attn_config")
    attention.ignore("attn_impl")
    attention.expect("attn_type", "multihead_attention", default="multihead_attention")
    attention.expect("alibi", True, default=True)
    # transformers takes 8 whatever the file says, and none of the options below.
    attention.expect("alibi_bias_max", 8, default=8)
    for option in ("attn_uses_sequence_id", "prefix_lm", "qk_ln"):
        attention.expect(option, False, default=False)
    fields = {
        "qkv_clip": attention.take("clip_qkv", None),
        "query_scale": attention.take("softmax_scale", None),
    }
    attention.refuse_rest()
    return fields


def write_config(config: DecoderConfig) -> dict[str, Any]:
    return {
        **write_fields(config, FIELDS),
        "attn_config": {"clip_qkv": config.qkv_clip, "softmax_scale": config.query_scale},
    }


FAMILY = Family(
    model_type="mpt",
    architecture="MptForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=(
        norm("attention_norm", "norm_1"),
        Part("attn.Wqkv", QKV, LINEAR),
        linear("attention/out", "attn.out_proj"),
        norm("mlp_norm", "norm_2"),
        linear("mlp/up", "ffn.up_proj"),
        linear("mlp/down", "ffn.down_proj"),
    ),
    layer="transformer.blocks.{}",
    embed="transformer.wte",
    final_norm="transformer.norm_f",
)
