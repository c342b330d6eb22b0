"""Mixtral (transformers' MixtralForCausalLM): Mistral with experts in every block."""

import dataclasses
from typing import Any

from lmjax.convert.activations import read_activation
from lmjax.convert.experts import expert_parts, moe_of, read_moe
from lmjax.convert.families import llama
from lmjax.convert.rope import read_rope
from lmjax.convert.settings import Settings
from lmjax.convert.windows import read_windows
from lmjax.models.config import DecoderConfig

ATTENTION = tuple(part for part in llama.BLOCK if not part.ours[0].startswith("mlp/"))
"""Llama's block without its MLP."""


def read_config(settings: Settings) -> dict[str, Any]:
    settings.rename({"num_experts": "num_local_experts"})
    shared = llama.read_shared(
        settings,
        intermediate_size=14336,
        num_key_value_heads=8,
        max_position_embeddings=4096 * 32,
        rms_norm_eps=1e-5,
    )
    window = settings.take("sliding_window", None)
    kind = "full_attention" if window is None else "sliding_attention"
    return {
        **shared,
        **read_rope(settings, theta=1e6),
        **read_windows(settings, [kind] * shared["num_layers"], window),
        "activation": read_activation(settings, "hidden_act", "silu"),
        "moe": read_moe(
            settings,
            num_experts=settings.take("num_local_experts", 8),
            experts_per_token=settings.take("num_experts_per_tok", 2),
        ),
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    moe = moe_of(config)
    return {
        **llama.write_shared(config),
        "sliding_window": config.sliding_window,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
    }


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=(*ATTENTION, *expert_parts("block_sparse_moe", gate="w1", up="w3", down="w2")),
)
