"""Gemma: norms that scale by 1 + w, a multiplied embedding, and from Gemma 2 on norms around each branch."""

import math

import transformers

from lmjax.models.decoder import DecoderConfig
from lmjax.nn.rope_scaling import LinearScaling
from tests.models.families import llama
from tests.models.families.family import Family, layer_types, rms_settings, rope_parameters, tiny_config
from tests.models.families.names import Names

SANDWICH = Names(
    embed="model.embed_tokens",
    final_norm="model.norm",
    layer="model.layers.{}",
    parts=llama.PARTS
    | {
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
)


def settings(config: DecoderConfig) -> dict:
    return rms_settings(config) | {"head_dim": config.head_width, "pad_token_id": 0}


def later_settings(config: DecoderConfig) -> dict:
    """What Gemma 2 and 3 add. The scale of queries is given as the number whose root divides the scores."""
    scale = config.head_width**-0.5 if config.query_scale is None else config.query_scale
    assert round(scale**-2) ** -0.5 == scale
    return {
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": config.sliding_window,
        "layer_types": layer_types(config),
    }


def gemma1(config: DecoderConfig):
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**settings(config)))


def gemma2(config: DecoderConfig):
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**settings(config), **later_settings(config)))


def gemma3(config: DecoderConfig):
    rope = {
        "full_attention": rope_parameters(config),
        "sliding_attention": rope_parameters(config, theta=config.rope_theta_sliding),
    }
    every = settings(config) | later_settings(config) | {"rope_parameters": rope}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**every))


GEMMA = {
    "norm_unit_offset": True,
    "norm_epsilon": 1e-6,
    "activation": "gelu_tanh",
    "embed_multiplier": math.sqrt(32),
    "tie_embeddings": True,
}
ALTERNATING = {"layer_pattern": ("sliding", "full"), "sliding_window": 4, "norm_placement": "sandwich"}

FAMILIES = {
    "gemma": Family(
        config=tiny_config(num_kv_heads=1, head_dim=16, rope_theta=100.0, **GEMMA),
        model=gemma1,
        names=llama.NAMES,
        wrong={"norm_epsilon": 1e-2},
        perturbed="input_layernorm.weight",
        grid={"multi-head": {"num_kv_heads": None}},
    ),
    "gemma2": Family(
        config=tiny_config(
            num_layers=3,
            num_kv_heads=2,
            head_dim=16,
            query_scale=20**-0.5,
            attention_softcap=3.0,
            logit_softcap=2.0,
            **GEMMA,
            **ALTERNATING,
        ),
        model=gemma2,
        names=SANDWICH,
        wrong={"attention_softcap": None},
        perturbed="pre_feedforward_layernorm.weight",
        grid={
            "no softcap of attention": {"attention_softcap": None},
            "no softcap of logits, heads' own scale": {"logit_softcap": None, "query_scale": None},
        },
    ),
    "gemma3": Family(
        config=tiny_config(
            num_layers=3,
            num_kv_heads=1,
            head_dim=16,
            qk_norm="head",
            rope_theta=1000.0,
            rope_theta_sliding=100.0,
            rope_scaling=LinearScaling(factor=8.0),
            **GEMMA,
            **ALTERNATING,
        ),
        model=gemma3,
        names=SANDWICH,
        wrong={"rope_theta_sliding": 1000.0},
        perturbed="self_attn.k_norm.weight",
        grid={
            "five sliding blocks to one": {"layer_pattern": ("sliding",) * 5 + ("full",), "num_layers": 8},
            "no scaling": {"rope_scaling": None, "num_kv_heads": 4, "query_scale": 24**-0.5},
        },
    ),
}
