"""OLMoE (transformers' OlmoeForCausalLM): norms of all queries and all keys together, experts in every block."""

import dataclasses
from typing import Any

from lmjax.convert.activations import read_activation
from lmjax.convert.experts import moe_of, read_moe
from lmjax.convert.families import llama, mixtral, qwen2_moe, qwen3
from lmjax.convert.rope import read_rope
from lmjax.convert.settings import Settings
from lmjax.models.config import DecoderConfig


def read_config(settings: Settings) -> dict[str, Any]:
    settings.rename({"num_local_experts": "num_experts"})
    settings.expect("head_dim", None)
    shared = llama.read_shared(
        settings,
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    return {
        **shared,
        **read_rope(settings),
        **llama.read_biases(settings),
        "activation": read_activation(settings, "hidden_act", "silu"),
        "qk_norm": "full",
        "qkv_clip": settings.take("clip_qkv", None),
        "moe": read_moe(
            settings,
            num_experts=settings.take("num_experts", 64),
            experts_per_token=settings.take("num_experts_per_tok", 8),
            renormalize=settings.take("norm_topk_prob", False),
        ),
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    moe = moe_of(config)
    return {
        **llama.write_shared(config),
        "attention_bias": config.qkv_bias,
        "clip_qkv": config.qkv_clip,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "norm_topk_prob": moe.renormalize,
    }


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=(*mixtral.ATTENTION, *qwen3.QK_NORMS, *qwen2_moe.EXPERTS),
)
