"""Multi-head latent attention in config.json, and the tensors of its parts."""

import math
from typing import Any

from lmjax.convert.family import GROUPED, LINEAR, Part, linear, norm
from lmjax.convert.rope import read_whole_rope, write_rope, write_scaling, yarn_mscale
from lmjax.convert.settings import Settings
from lmjax.errors import InputError
from lmjax.models.config import DecoderConfig
from lmjax.nn.attention_latent import LatentConfig
from lmjax.nn.rope_scaling import YarnScaling

PARTS = (
    linear("attention/query", "self_attn.q_proj"),
    linear("attention/query_down", "self_attn.q_a_proj"),
    norm("attention/query_norm", "self_attn.q_a_layernorm"),
    linear("attention/query_up", "self_attn.q_b_proj"),
    Part("self_attn.kv_a_proj_with_mqa", ("attention/kv_down", "attention/key_rope"), LINEAR),
    norm("attention/kv_norm", "self_attn.kv_a_layernorm"),
    Part("self_attn.kv_b_proj", ("attention/key_up", "attention/value_up"), GROUPED),
    linear("attention/out", "self_attn.o_proj"),
)
FIELDS = {
    "kv_rank": "kv_lora_rank",
    "query_rank": "q_lora_rank",
    "rope_dim": "qk_rope_head_dim",
    "value_dim": "v_head_dim",
}


def read_latent(settings: Settings) -> dict[str, Any]:
    """The fields of attention and of rotary positions. Norms have the epsilon that transformers' class fixes.

    Raises InputError, with the file, for sizes that cannot be.
    """
    try:
        latent = LatentConfig(**{ours: settings.take(theirs) for ours, theirs in FIELDS.items()})
    except InputError as error:
        raise InputError(f"{settings.place}: not an attention that the decoder can have: {error}") from None
    head_dim = settings.take("qk_nope_head_dim") + latent.rope_dim
    return {
        **read_whole_rope(settings),
        "head_dim": head_dim,
        "latent": latent,
        "query_scale": _read_scale(settings, head_dim),
        "rope_interleaved": settings.take("rope_interleave", True),
    }


def write_latent(config: DecoderConfig) -> dict[str, Any]:
    """The keys; those of a decoder without such attention read as another model."""
    latent = config.latent or LatentConfig(kv_rank=1, rope_dim=1, value_dim=1)
    return {
        **write_rope(config),
        **_write_scale(config),
        **{theirs: getattr(latent, ours) for ours, theirs in FIELDS.items()},
        "qk_nope_head_dim": config.head_width - latent.rope_dim,
        "rope_interleave": config.rope_interleaved,
    }


def _read_scale(settings: Settings, head_dim: int) -> float | None:
    """``query_scale`` where ``mscale_all_dim`` changes it, as in transformers' ``yarn_apply_mscale``."""
    parameters = settings.take("rope_scaling", None) or settings.take("rope_parameters", None) or {}
    weight = parameters.get("mscale_all_dim")
    return head_dim**-0.5 * yarn_mscale(parameters["factor"], weight) ** 2 if weight else None


def _write_scale(config: DecoderConfig) -> dict[str, Any]:
    """``rope_scaling`` with ``mscale_all_dim`` where the decoder's ``query_scale`` is not that of its head_dim."""
    scaling, scale = config.rope_scaling, config.query_scale
    if not isinstance(scaling, YarnScaling) or scaling.factor <= 1 or scale is None:
        return {}
    weight = (math.sqrt(scale * math.sqrt(config.head_width)) - 1) / (0.1 * math.log(scaling.factor))
    keys = write_scaling(scaling) | {"mscale_all_dim": round(weight, 9)}
    if scaling.attention_factor == 1:  # as in published files
        del keys["attention_factor"]
        keys["mscale"] = keys["mscale_all_dim"]
    return {"rope_scaling": keys}
