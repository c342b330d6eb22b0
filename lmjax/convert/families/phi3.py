"""Phi-3 and 3.5 mini, Phi-4 (transformers' Phi3ForCausalLM): Llama with fused projections, and LongRoPE."""

import dataclasses
from typing import Any

from lmjax.convert.activations import read_activation
from lmjax.convert.families import llama
from lmjax.convert.family import LINEAR, QKV, Part, linear, norm
from lmjax.convert.rope import read_rope
from lmjax.convert.settings import Settings
from lmjax.convert.windows import read_windows
from lmjax.errors import InputError
from lmjax.models.config import DecoderConfig
from lmjax.nn.rope_scaling import LongRopeScaling


def read_config(settings: Settings) -> dict[str, Any]:
    for key, only in {"attention_bias": False, "mlp_bias": False, "lm_head_bias": False, "full_attn_mod": 1}.items():
        settings.expect(key, only, default=only)
    shared = llama.read_shared(
        settings,
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        original_max_position_embeddings=4096,
    )
    settings.ignore("original_max_position_embeddings")  # has no effect without a scaling
    rope = read_rope(settings)
    scaling = rope["rope_scaling"]
    if scaling is not None and not isinstance(scaling, LongRopeScaling):
        raise InputError(f"{settings.place}: rope_type is {scaling.kind}; in this family it has to be longrope")
    window = settings.take("sliding_window", None)
    if isinstance(window, int) and window >= shared["max_length"]:  # as in Phi-3.5, where no row is so long
        window = None
    kind = "full_attention" if window is None else "sliding_attention"
    return {
        **shared,
        **rope,
        **read_windows(settings, [kind] * shared["num_layers"], window),
        "activation": read_activation(settings, "hidden_act", "silu"),
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    keys = {**llama.write_shared(config), "sliding_window": config.sliding_window}
    original = config.max_length
    if isinstance(config.rope_scaling, LongRopeScaling):
        # transformers 4 wants the kind under its first name here, and the length beside the scaling.
        scaling = keys["rope_scaling"]
        original = scaling.pop("original_max_position_embeddings")
        keys["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
    return {**keys, "original_max_position_embeddings": original}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=(
        norm("attention_norm", "input_layernorm"),
        Part("self_attn.qkv_proj", QKV, LINEAR),
        linear("attention/out", "self_attn.o_proj"),
        norm("mlp_norm", "post_attention_layernorm"),
        Part("mlp.gate_up_proj", ("mlp/gate", "mlp/up"), LINEAR),
        linear("mlp/down", "mlp.down_proj"),
    ),
)
