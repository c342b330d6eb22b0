"""GPT-2 and its relatives: LayerNorm with biases, and an MLP without a gate."""

import transformers

from lmjax.models.decoder import DecoderConfig
from tests.models.families.family import ACTIVATIONS, Family, gpt_settings, rope_parameters, tiny_config
from tests.models.families.names import Names

GPT2_PARTS = {
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "attention.query": "attn.c_attn",
    "attention.key": "attn.c_attn",
    "attention.value": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
GPT2_NAMES = Names(
    embed="transformer.wte",
    position="transformer.wpe",
    final_norm="transformer.ln_f",
    layer="transformer.h.{}",
    parts=GPT2_PARTS,
    input_first=True,
)
BIGCODE_NAMES = Names(
    embed="transformer.wte",
    position="transformer.wpe",
    final_norm="transformer.ln_f",
    layer="transformer.h.{}",
    parts=GPT2_PARTS,
    fused="grouped",
)
GPTJ_NAMES = Names(
    embed="transformer.wte",
    final_norm="transformer.ln_f",
    layer="transformer.h.{}",
    parts={
        "attention_norm": "ln_1",
        "attention.query": "attn.q_proj",
        "attention.key": "attn.k_proj",
        "attention.value": "attn.v_proj",
        "attention.out": "attn.out_proj",
        "mlp.up": "mlp.fc_in",
        "mlp.down": "mlp.fc_out",
    },
)
NEOX_NAMES = Names(
    embed="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    layer="gpt_neox.layers.{}",
    parts={
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.query": "attention.query_key_value",
        "attention.key": "attention.query_key_value",
        "attention.value": "attention.query_key_value",
        "attention.out": "attention.dense",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    },
    fused="grouped",
)
OPT_NAMES = Names(
    embed="model.decoder.embed_tokens",
    position="model.decoder.embed_positions",
    position_offset=2,
    final_norm="model.decoder.final_layer_norm",
    layer="model.decoder.layers.{}",
    parts={
        "attention_norm": "self_attn_layer_norm",
        "mlp_norm": "final_layer_norm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.out": "self_attn.out_proj",
        "mlp.up": "fc1",
        "mlp.down": "fc2",
    },
)
PHI2_NAMES = Names(
    embed="model.embed_tokens",
    final_norm="model.final_layernorm",
    layer="model.layers.{}",
    parts={
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.out": "self_attn.dense",
        "mlp.up": "mlp.fc1",
        "mlp.down": "mlp.fc2",
    },
)


def gpt2(config: DecoderConfig):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt_settings(config)))


def starcoder(config: DecoderConfig):
    multi_query = {1: True, config.num_heads: False}[config.kv_heads]
    return transformers.GPTBigCodeForCausalLM(
        transformers.GPTBigCodeConfig(**gpt_settings(config), multi_query=multi_query)
    )


def gptj(config: DecoderConfig):
    assert config.rope_theta == 10_000, "it is not a setting there"
    width = round(config.rope_fraction * config.head_width)
    return transformers.GPTJForCausalLM(transformers.GPTJConfig(**gpt_settings(config), rotary_dim=width))


def partial_rope(config: DecoderConfig) -> dict:
    """Here the default is not the whole head."""
    return rope_parameters(config) | {"partial_rotary_factor": config.rope_fraction}


def neox(config: DecoderConfig):
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_length,
            hidden_size=config.embed_dim,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            hidden_act=ACTIVATIONS[config.activation],
            layer_norm_eps=config.norm_epsilon,
            rope_parameters=partial_rope(config),
            use_parallel_residual=config.residual == "parallel",
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    )


def opt(config: DecoderConfig):
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_length,
            hidden_size=config.embed_dim,
            ffn_dim=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            activation_function=ACTIVATIONS[config.activation],
            enable_bias=config.qkv_bias,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    )


def phi2(config: DecoderConfig):
    return transformers.PhiForCausalLM(
        transformers.PhiConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_length,
            hidden_size=config.embed_dim,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            hidden_act=ACTIVATIONS[config.activation],
            layer_norm_eps=config.norm_epsilon,
            rope_parameters=partial_rope(config),
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    )


PLAIN = {"norm": "layer", "norm_bias": True, "mlp_gated": False}
BIASES = {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}
LEARNED = PLAIN | BIASES | {"position": "learned", "tie_embeddings": True}
WIDE = {"embed_dim": 64}

FAMILIES = {
    "gpt2": Family(
        config=tiny_config(activation="gelu_tanh", **LEARNED),
        model=gpt2,
        names=GPT2_NAMES,
        wrong={"activation": "gelu"},
        perturbed="transformer.wpe.weight",
        grid={"untied": {"tie_embeddings": False}, "as long as it gets": {"max_length": 13}},
    ),
    "starcoder": Family(
        config=tiny_config(activation="gelu_tanh", num_kv_heads=1, **LEARNED),
        model=starcoder,
        names=BIGCODE_NAMES,
        wrong={"norm_epsilon": 1e-2},
        perturbed="attn.c_attn.bias",
        grid={"multi-head": {"num_kv_heads": None}},
    ),
    "gpt-j": Family(
        config=tiny_config(
            activation="gelu_tanh",
            residual="parallel_shared_norm",
            mlp_bias=True,
            head_bias=True,
            rope_fraction=0.25,
            rope_interleaved=True,
            **PLAIN,
            **WIDE,
        ),
        model=gptj,
        names=GPTJ_NAMES,
        wrong={"rope_fraction": 0.5},
        perturbed="lm_head.bias",
        grid={"all dimensions turn": {"rope_fraction": 1.0}},
    ),
    "gpt-neox": Family(
        config=tiny_config(
            activation="gelu", residual="parallel", rope_fraction=0.25, rope_theta=100.0, **PLAIN, **BIASES, **WIDE
        ),
        model=neox,
        names=NEOX_NAMES,
        wrong={"residual": "sequential"},
        perturbed="attention.query_key_value.bias",
        grid={"sequential": {"residual": "sequential", "rope_fraction": 1.0}, "tied": {"tie_embeddings": True}},
    ),
    "opt": Family(
        config=tiny_config(activation="relu", **LEARNED),
        model=opt,
        names=OPT_NAMES,
        wrong={"activation": "gelu"},
        perturbed="final_layer_norm.bias",
        grid={"no biases": dict.fromkeys(BIASES, False)},
    ),
    "phi2": Family(
        config=tiny_config(
            activation="gelu_tanh",
            residual="parallel_shared_norm",
            head_bias=True,
            rope_fraction=0.4,
            rope_theta=100.0,
            num_heads=2,
            embed_dim=40,
            **PLAIN,
            **BIASES,
        ),
        model=phi2,
        names=PHI2_NAMES,
        wrong={"rope_fraction": 0.5},
        perturbed="self_attn.dense.bias",
        grid={"multi-query": {"num_kv_heads": 1, "rope_fraction": 0.5}},
    ),
}
