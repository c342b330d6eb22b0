"""DBRX (transformers' DbrxForCausalLM): LayerNorm without biases, clipped queries, keys and values, 16 experts."""

from typing import Any

from lmjax.convert.activations import read_activation, write_activation
from lmjax.convert.experts import moe_of, read_moe
from lmjax.convert.family import LINEAR, QKV, Family, Part, linear, norm, read_fields, write_fields
from lmjax.convert.layouts import Experts
from lmjax.convert.rope import read_whole_rope, write_rope
from lmjax.convert.settings import Settings
from lmjax.errors import InputError
from lmjax.models.config import DecoderConfig

FIELDS = {
    "vocab_size": "vocab_size",
    "max_length": "max_seq_len",
    "embed_dim": "d_model",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
}
OTHER_NAMES = {"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
DEFAULTS = dict(zip(FIELDS.values(), (32000, 2048, 2048, 24, 16), strict=True))


def read_config(settings: Settings) -> dict[str, Any]:
    settings.rename(OTHER_NAMES | {"max_position_embeddings": "max_seq_len"})
    settings.fill(DEFAULTS)
    settings.expect("tie_word_embeddings", False, default=False)
    fields = read_fields(settings, FIELDS)
    settings.fill({"max_position_embeddings": fields["max_length"]})
    return {**fields, **_read_attention(settings), **_read_experts(settings), "norm": "layer"}


def _read_attention(settings: Settings) -> dict[str, Any]:
    inside = settings.inside("attn_config")
    num_kv_heads, theta = inside.take("kv_n_heads", 1), inside.take("rope_theta", None)
    clip = read_fields(inside, {"qkv_clip": "clip_qkv"})  # without which transformers' class does not run
    inside.refuse_rest()
    settings.expect("num_key_value_heads", num_kv_heads, default=num_kv_heads)  # transformers 5 writes it again
    rope = read_whole_rope(settings, theta=theta or 10_000.0)
    if theta is not None and rope["rope_theta"] != theta:
        raise InputError(
            f"{settings.place}: rope_theta is {rope['rope_theta']} and that of attn_config {theta}; transformers 5 "
            "writes the first without reading the second, so set both to what the model was trained with"
        )
    return {**rope, **clip, "num_kv_heads": num_kv_heads}


def _read_experts(settings: Settings) -> dict[str, Any]:
    inside = settings.inside("ffn_config")
    activation = inside.inside("ffn_act_fn")
    inside.ignore("hidden_size", "moe_jitter_eps", "moe_loss_weight")  # that of the model, and settings of training
    inside.expect("moe_normalize_expert_weights", 1, None, default=1)
    numbers = {"num_experts": inside.take("moe_num_experts", 4), "experts_per_token": inside.take("moe_top_k", 1)}
    renormalize = inside.take("moe_normalize_expert_weights", 1) is not None
    moe = read_moe(inside, **numbers, renormalize=renormalize)
    fields = {
        "mlp_dim": inside.take("ffn_hidden_size", 3584),
        "activation": read_activation(activation, "name", "silu"),
    }
    for settings in (inside, activation):
        settings.refuse_rest()
    return {**fields, "moe": moe}


def write_config(config: DecoderConfig) -> dict[str, Any]:
    moe = moe_of(config)
    return {
        **write_fields(config, FIELDS),
        **write_rope(config),
        "attn_config": {"clip_qkv": config.qkv_clip, "kv_n_heads": config.kv_heads, "rope_theta": config.rope_theta},
        "ffn_config": {
            "ffn_act_fn": {"name": write_activation(config.activation)},
            "ffn_hidden_size": config.mlp_dim,
            "moe_num_experts": moe.num_experts,
            "moe_top_k": moe.experts_per_token,
            "moe_normalize_expert_weights": 1.0 if moe.renormalize else None,
        },
    }


FAMILY = Family(
    model_type="dbrx",
    architecture="DbrxForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=(
        norm("attention_norm", "norm_attn_norm.norm_1"),
        Part("norm_attn_norm.attn.Wqkv", QKV, LINEAR),
        linear("attention/out", "norm_attn_norm.attn.out_proj"),
        norm("mlp_norm", "norm_attn_norm.norm_2"),
        linear("moe/router", "ffn.router.layer"),
        Part("ffn.experts.mlp.w1", ("moe/gate",), Experts(output_first=True), is_tensor=True),
        Part("ffn.experts.mlp.v1", ("moe/up",), Experts(output_first=True), is_tensor=True),
        Part("ffn.experts.mlp.w2", ("moe/down",), Experts(output_first=False), is_tensor=True),
    ),
    layer="transformer.blocks.{}",
    embed="transformer.wte",
    final_norm="transformer.norm_f",
)
