"""Falcon in its three layouts, and the other families that know ALiBi: MPT and BLOOM."""

import transformers

from lmjax.models.decoder import DecoderConfig
from tests.models.families.family import ACTIVATIONS, Family, rope_parameters, tiny_config
from tests.models.families.names import Names

FALCON_PARTS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.query": "self_attention.query_key_value",
    "attention.key": "self_attention.query_key_value",
    "attention.value": "self_attention.query_key_value",
    "attention.out": "self_attention.dense",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
FALCON_NAMES = Names(
    embed="transformer.word_embeddings",
    final_norm="transformer.ln_f",
    layer="transformer.h.{}",
    parts=FALCON_PARTS,
    fused="grouped",
)
FALCON_40B_NAMES = Names(
    embed="transformer.word_embeddings",
    final_norm="transformer.ln_f",
    layer="transformer.h.{}",
    parts=FALCON_PARTS | {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"},
    fused="grouped",
)
BLOOM_NAMES = Names(
    embed="transformer.word_embeddings",
    embed_norm="transformer.word_embeddings_layernorm",
    final_norm="transformer.ln_f",
    layer="transformer.h.{}",
    parts=FALCON_PARTS,
    fused="grouped",
)
MPT_NAMES = Names(
    embed="transformer.wte",
    final_norm="transformer.norm_f",
    layer="transformer.blocks.{}",
    parts={
        "attention_norm": "norm_1",
        "mlp_norm": "norm_2",
        "attention.query": "attn.Wqkv",
        "attention.key": "attn.Wqkv",
        "attention.value": "attn.Wqkv",
        "attention.out": "attn.out_proj",
        "mlp.up": "ffn.up_proj",
        "mlp.down": "ffn.down_proj",
    },
)


def falcon(config: DecoderConfig, new_architecture: bool = False):
    """ALiBi is rounded to bfloat16 there, by which slopes 2^-n in rows of up to 256 tokens lose nothing; and eager
    attention adds it twice, with the mask and by itself, so that the comparison is with sdpa."""
    return transformers.FalconForCausalLM(
        transformers.FalconConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_length,
            hidden_size=config.embed_dim,
            ffn_hidden_size=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_kv_heads=config.kv_heads,
            multi_query=config.kv_heads == 1,
            new_decoder_architecture=new_architecture,
            num_ln_in_parallel_attn=1 if config.residual == "parallel_shared_norm" else None,
            parallel_attn=config.residual != "sequential",
            alibi=config.position == "alibi",
            rope_parameters=rope_parameters(config),
            bias=config.qkv_bias,
            activation=ACTIVATIONS[config.activation],
            layer_norm_epsilon=config.norm_epsilon,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="sdpa",
        )
    )


def falcon_40b(config: DecoderConfig):
    return falcon(config, new_architecture=True)


def mpt(config: DecoderConfig):
    return transformers.MptForCausalLM(
        transformers.MptConfig(
            vocab_size=config.vocab_size,
            max_seq_len=config.max_length,
            d_model=config.embed_dim,
            n_layers=config.num_layers,
            n_heads=config.num_heads,
            expansion_ratio=config.mlp_dim // config.embed_dim,
            layer_norm_epsilon=config.norm_epsilon,
            attn_config={"clip_qkv": config.qkv_clip, "softmax_scale": config.query_scale},
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    )


def bloom(config: DecoderConfig):
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.embed_dim,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            layer_norm_epsilon=config.norm_epsilon,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="eager",
        )
    )


PLAIN = {"norm": "layer", "mlp_gated": False, "mlp_dim": 128, "tie_embeddings": True}
BIASES = {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}
FALCON = PLAIN | {"norm_bias": True, "activation": "gelu"}
SIX_HEADS = {"num_heads": 6, "embed_dim": 48, "mlp_dim": 192}

FAMILIES = {
    "falcon 7b": Family(
        config=tiny_config(residual="parallel_shared_norm", num_kv_heads=1, rope_theta=100.0, **FALCON),
        model=falcon,
        names=FALCON_NAMES,
        wrong={"activation": "gelu_tanh"},
        perturbed="input_layernorm.bias",
        grid={"every bias": BIASES, "untied": {"tie_embeddings": False}},
    ),
    "falcon 40b": Family(
        config=tiny_config(residual="parallel", num_kv_heads=2, rope_theta=100.0, **FALCON),
        model=falcon_40b,
        names=FALCON_40B_NAMES,
        wrong={"rope_theta": 110.0},
        perturbed="ln_mlp.weight",
        grid={"every bias": BIASES, "multi-query": {"num_kv_heads": 1}},
    ),
    "falcon rw": Family(
        config=tiny_config(position="alibi", alibi_scale=8**-0.5, **FALCON, **BIASES),
        model=falcon,
        names=FALCON_NAMES,
        wrong={"position": "rope", "alibi_scale": 1.0},
        perturbed="post_attention_layernorm.bias",
        grid={"six heads": SIX_HEADS},
    ),
    "mpt": Family(
        config=tiny_config(activation="gelu", position="alibi", **(PLAIN | SIX_HEADS)),
        model=mpt,
        names=MPT_NAMES,
        wrong={"qkv_clip": 0.5},
        perturbed="norm_2.weight",
        grid={
            "four heads, clipped": {"num_heads": 4, "embed_dim": 32, "mlp_dim": 128, "qkv_clip": 0.5},
            "own scale of queries": {"query_scale": 0.3},
            "five heads": {"num_heads": 5, "embed_dim": 40, "mlp_dim": 160},
        },
    ),
    "bloom": Family(
        config=tiny_config(
            activation="gelu_tanh",
            position="alibi",
            embed_norm=True,
            norm_bias=True,
            **(PLAIN | SIX_HEADS),
            **BIASES,
        ),
        model=bloom,
        names=BLOOM_NAMES,
        wrong={"norm_epsilon": 1e-2},
        perturbed="word_embeddings_layernorm.bias",
        grid={
            "four heads": {"num_heads": 4, "embed_dim": 32, "mlp_dim": 128},
            "seven heads": {"num_heads": 7, "embed_dim": 56, "mlp_dim": 224},
            "untied": {"tie_embeddings": False},
        },
    ),
}
