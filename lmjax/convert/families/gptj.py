"""GPT-J (transformers' GPTJForCausalLM)."""

import math
from typing import Any

from lmjax.convert.families.gpt2 import read_shared, write_shared
from lmjax.convert.family import Family, head_dim_of, linear, norm
from lmjax.convert.settings import Settings
from lmjax.errors import InputError
from lmjax.models.config import DecoderConfig

DEFAULTS = {
    "vocab_size": 50400,
    "n_positions": 2048,
    "n_embd": 4096,
    "n_layer": 28,
    "n_head": 16,
    "tie_word_embeddings": False,
}


def read_config(settings: Settings) -> dict[str, Any]:
    settings.expect("rotary", True, default=True)
    settings.expect("scale_attn_weights", True, default=True)
    shared = read_shared(settings, activation="gelu_new", **DEFAULTS)
    width = settings.take("rotary_dim", 64)
    if width is None:
        raise InputError(f"{settings.place}: rotary_dim is null, which is not supported; it has to be a number")
    return {
        **shared,
        "residual": "parallel_shared_norm",
        "head_bias": True,
        "rope_fraction": _fraction(width, head_dim_of(shared)),
        "rope_interleaved": True,
    }


def _fraction(width: int, head_dim: int) -> float:
    """That part of a head which, times its width and rounded down, is ``width``."""
    fraction = width / head_dim
    return fraction if int(head_dim * fraction) == width else math.nextafter(fraction, 1)


def write_config(config: DecoderConfig) -> dict[str, Any]:
    return {**write_shared(config, activation="gelu_new"), "rotary_dim": config.rope_width}


FAMILY = Family(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=(
        norm("attention_norm", "ln_1"),
        linear("attention/query", "attn.q_proj"),
        linear("attention/key", "attn.k_proj"),
        linear("attention/value", "attn.v_proj"),
        linear("attention/out", "attn.out_proj"),
        linear("mlp/up", "mlp.fc_in"),
        linear("mlp/down", "mlp.fc_out"),
    ),
    layer="transformer.h.{}",
    embed="transformer.wte",
    final_norm="transformer.ln_f",
    ignored=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias|embed_positions)",),
)
