"""Llama and the families that differ from it in a switch or two."""

import transformers

from lmjax.models.decoder import DecoderConfig
from lmjax.nn.rope_scaling import DynamicScaling, LinearScaling, Llama3Scaling, LongRopeScaling, YarnScaling
from tests.models.families.family import Family, layer_types, rms_settings, tiny_config
from tests.models.families.names import Names

PARTS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
NAMES = Names(embed="model.embed_tokens", final_norm="model.norm", layer="model.layers.{}", parts=PARTS)
PHI3_NAMES = Names(
    embed="model.embed_tokens",
    final_norm="model.norm",
    layer="model.layers.{}",
    parts=PARTS
    | dict.fromkeys(("attention.query", "attention.key", "attention.value"), "self_attn.qkv_proj")
    | dict.fromkeys(("mlp.gate", "mlp.up"), "mlp.gate_up_proj"),
)
OLMO2_NAMES = Names(
    embed="model.embed_tokens",
    final_norm="model.norm",
    layer="model.layers.{}",
    parts=PARTS | {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
)


def llama(config: DecoderConfig):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **rms_settings(config),
            head_dim=config.head_width,
            attention_bias=config.qkv_bias,
            mlp_bias=config.mlp_bias,
        )
    )


def mistral(config: DecoderConfig):
    settings = rms_settings(config)
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**settings, head_dim=config.head_width, sliding_window=config.sliding_window)
    )


def qwen2(config: DecoderConfig):
    windows = {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
    settings = rms_settings(config) | windows
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**settings, layer_types=layer_types(config)))


def qwen3(config: DecoderConfig):
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**rms_settings(config), head_dim=config.head_width))


def phi3(config: DecoderConfig):
    scaling = config.rope_scaling
    original = config.max_length if scaling is None else scaling.original_length
    return transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            **rms_settings(config),
            original_max_position_embeddings=original,
            sliding_window=config.sliding_window,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def olmo2(config: DecoderConfig):
    return transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**rms_settings(config), eos_token_id=None))


def granite(config: DecoderConfig):
    return transformers.GraniteForCausalLM(
        transformers.GraniteConfig(
            **rms_settings(config),
            embedding_multiplier=config.embed_multiplier,
            residual_multiplier=config.residual_multiplier,
            attention_multiplier=config.query_scale,
            logits_scaling=1 / config.logit_multiplier,
        )
    )


WIDE = {"embed_dim": 64}
LLAMA3 = Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=64)
WINDOWS = {"layer_pattern": ("sliding",), "sliding_window": 4}


def longrope(original_length: int) -> LongRopeScaling:
    """For heads of 8 dimensions."""
    short, long = (1.0, 1.05, 1.1, 1.3), (1.1, 1.6, 4.8, 12.2)
    return LongRopeScaling(
        short_factors=short, long_factors=long, original_length=original_length, attention_factor=1.2
    )


FAMILIES = {
    "llama": Family(
        config=tiny_config(rope_theta=100.0, norm_epsilon=1e-6),
        model=llama,
        names=NAMES,
        wrong={"rope_theta": 110.0},
        perturbed="post_attention_layernorm.weight",
        grid={
            "large epsilon": {"norm_epsilon": 1e-2},
            "grouped-query": {"num_kv_heads": 2, "num_layers": 3},
            "multi-query, tied": {"num_kv_heads": 1, "tie_embeddings": True},
            "one wide head": {"num_heads": 1, "head_dim": 6},
            "every bias": {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},
            "linear": {"rope_scaling": LinearScaling(factor=4.0)},
            "dynamic, beyond": {"rope_scaling": DynamicScaling(factor=2.0, original_length=8)},
            "dynamic, within": {"rope_scaling": DynamicScaling(factor=2.0, original_length=20)},
            "yarn, beyond": {"rope_scaling": YarnScaling(factor=4.0, original_length=8, beta_fast=4.0), **WIDE},
            "yarn, within": {"rope_scaling": YarnScaling(factor=4.0, original_length=64), **WIDE},
            "yarn, own attention factor": {
                "rope_scaling": YarnScaling(factor=4.0, original_length=64, attention_factor=1.5, truncate=False),
                **WIDE,
            },
            "longrope, beyond": {"rope_scaling": longrope(original_length=8)},
            "longrope, within": {"rope_scaling": longrope(original_length=13)},
        },
    ),
    "llama3.1": Family(
        config=tiny_config(num_kv_heads=2, rope_theta=100.0, rope_scaling=LLAMA3, **WIDE),
        model=llama,
        names=NAMES,
        wrong={"rope_scaling": None},
        perturbed="mlp.gate_proj.weight",
        grid={
            "llama3": {"rope_scaling": None, "rope_theta": 500_000.0},
            "llama3.2": {"tie_embeddings": True},
        },
    ),
    "mistral": Family(
        config=tiny_config(num_kv_heads=2, **WINDOWS),
        model=mistral,
        names=NAMES,
        wrong={"sliding_window": 5},
        perturbed="self_attn.v_proj.weight",
        grid={
            "v0.2": {"layer_pattern": ("full",), "sliding_window": None, "rope_theta": 1e6, "head_dim": 6},
            "a window of one": {"sliding_window": 1},
            "a window of all": {"sliding_window": 13},
        },
    ),
    "qwen2": Family(
        config=tiny_config(num_kv_heads=2, qkv_bias=True, norm_epsilon=1e-6),
        model=qwen2,
        names=NAMES,
        wrong={"rope_theta": 100.0},
        perturbed="self_attn.k_proj.bias",
        grid={
            "tied": {"tie_embeddings": True},
            "windows in some layers": WINDOWS | {"layer_pattern": ("full", "sliding"), "num_layers": 3},
        },
    ),
    "qwen3": Family(
        config=tiny_config(num_kv_heads=2, head_dim=12, qk_norm="head", norm_epsilon=1e-6),
        model=qwen3,
        names=NAMES,
        wrong={"norm_epsilon": 1e-2},
        perturbed="self_attn.q_norm.weight",
        grid={"tied": {"tie_embeddings": True}, "multi-query": {"num_kv_heads": 1}},
    ),
    "phi3 4k": Family(
        config=tiny_config(**WINDOWS),
        model=phi3,
        names=PHI3_NAMES,
        wrong={"sliding_window": 3},
        perturbed="mlp.gate_up_proj.weight",
        grid={
            "grouped-query, no window": {"num_kv_heads": 2, "layer_pattern": ("full",), "sliding_window": None},
            "partial rotation": {"rope_fraction": 0.75, "num_heads": 2},
        },
    ),
    "phi3 128k": Family(
        config=tiny_config(rope_scaling=longrope(original_length=8)),
        model=phi3,
        names=PHI3_NAMES,
        wrong={"rope_scaling": longrope(original_length=13)},
        perturbed="self_attn.qkv_proj.weight",
        grid={"a row of the first length": {"rope_scaling": longrope(original_length=13)}},
    ),
    "olmo2": Family(
        config=tiny_config(norm_placement="post", qk_norm="full", num_kv_heads=2, rope_theta=100.0),
        model=olmo2,
        names=OLMO2_NAMES,
        wrong={"norm_epsilon": 1e-2},
        perturbed="self_attn.k_norm.weight",
        grid={"multi-head": {"num_kv_heads": None}, "multi-query": {"num_kv_heads": 1, "num_layers": 3}},
    ),
    "granite": Family(
        config=tiny_config(
            num_kv_heads=2,
            rope_theta=100.0,
            embed_multiplier=6.0,
            residual_multiplier=0.4,
            query_scale=0.2,
            logit_multiplier=0.75,
            tie_embeddings=True,
        ),
        model=granite,
        names=NAMES,
        wrong={"residual_multiplier": 0.5},
        perturbed="self_attn.q_proj.weight",
    ),
}
