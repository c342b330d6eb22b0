"""Gemma 2 (transformers' Gemma2ForCausalLM): norms around each branch, capped scores and logits, alternate windows."""

import dataclasses
from typing import Any

from lmjax.convert.families import gemma, llama
from lmjax.convert.family import norm
from lmjax.convert.rope import read_rope
from lmjax.convert.settings import Settings
from lmjax.convert.windows import read_windows, write_layer_types
from lmjax.models.config import DecoderConfig

SANDWICH = (
    norm("attention_post_norm", "post_attention_layernorm"),
    norm("mlp_norm", "pre_feedforward_layernorm"),
    norm("mlp_post_norm", "post_feedforward_layernorm"),
)
BLOCK = (*(part for part in llama.BLOCK if part.ours != ("mlp_norm",)), *SANDWICH)


def read_shared(
    settings: Settings, *, score_cap: float | None, logit_cap: float | None, every: int, **defaults: Any
) -> dict[str, Any]:
    """The fields of Gemma 3 too, but rotary positions.

    The caps hold where the file does not say; one layer of ``every`` sees all.
    """
    settings.expect("hidden_activation", gemma.ACTIVATION, default=gemma.ACTIVATION)
    settings.expect("hidden_act", gemma.ACTIVATION, None)
    shared = gemma.read_shared(
        settings,
        **{
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            **defaults,
        },
    )
    num_layers = shared["num_layers"]
    kinds = ["sliding_attention" if layer % every else "full_attention" for layer in range(1, num_layers + 1)]
    scale = settings.take("query_pre_attn_scalar", 256) ** -0.5
    return {
        **shared,
        **read_windows(settings, kinds, settings.take("sliding_window", 4096)),
        "norm_placement": "sandwich",
        "query_scale": None if scale == shared["head_dim"] ** -0.5 else scale,
        "attention_softcap": settings.take("attn_logit_softcapping", score_cap),
        "logit_softcap": settings.take("final_logit_softcapping", logit_cap),
    }


def write_shared(config: DecoderConfig) -> dict[str, Any]:
    keys = gemma.write_shared(config)
    del keys["hidden_act"]  # not a key of this class
    return {
        **keys,
        "hidden_activation": gemma.ACTIVATION,
        "query_pre_attn_scalar": round(config.attention("full").query_scale ** -2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": config.sliding_window,
        "layer_types": write_layer_types(config),
    }


def read_config(settings: Settings) -> dict[str, Any]:
    shared = read_shared(settings, score_cap=50.0, logit_cap=30.0, every=2, max_position_embeddings=8192)
    return {**shared, **read_rope(settings)}


def write_config(config: DecoderConfig) -> dict[str, Any]:
    return write_shared(config)


FAMILY = dataclasses.replace(
    gemma.FAMILY,
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=BLOCK,
)
