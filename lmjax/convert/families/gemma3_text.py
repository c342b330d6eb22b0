"""Gemma 3, its text models (transformers' Gemma3ForCausalLM): rotary positions of their own in sliding layers."""

import dataclasses
from typing import Any

from lmjax.convert.families import gemma2, qwen3
from lmjax.convert.rope import read_scaling
from lmjax.convert.settings import Settings
from lmjax.errors import InputError
from lmjax.models.config import DecoderConfig


def read_theta_and_scaling(settings: Settings, kind: str, scaling: Any, theta: float) -> tuple[float, Any]:
    """Those of the layers of one kind, whose entry in ``rope_parameters`` counts before the old keys."""
    nested = (settings.take("rope_parameters", None) or {}).get(kind) or {}
    parameters = {**nested, **(scaling or {})}
    return float(parameters.pop("rope_theta", None) or theta), read_scaling(settings, parameters)


def read_config(settings: Settings) -> dict[str, Any]:
    every = settings.take("sliding_window_pattern", 6)
    settings.ignore("_sliding_window_pattern")  # transformers' own note of it, which it does not read
    both = settings.take("rope_parameters", None) or {}
    if both and not both.keys() <= {"full_attention", "sliding_attention"}:
        raise InputError(
            f"{settings.place}: rope_parameters has {', '.join(both)}; in this family it has one entry for the layers "
            "of full_attention and one for those of sliding_attention"
        )
    shared = gemma2.read_shared(
        settings,
        score_cap=None,
        logit_cap=None,
        every=every,
        vocab_size=262208,
        max_position_embeddings=131072,
    )
    old = settings.take("rope_scaling", None)
    theta, scaling = read_theta_and_scaling(settings, "full_attention", old, settings.take("rope_theta", 1e6))
    local = settings.take("rope_local_base_freq", 1e4)
    local, local_scaling = read_theta_and_scaling(settings, "sliding_attention", None, local)
    if local_scaling is not None:
        raise InputError(
            f"{settings.place}: the layers of sliding_attention have rope_type {local_scaling.kind}, which is not "
            "supported; it has to be default"
        )
    has_own = shared["sliding_window"] is not None and (local, None) != (theta, scaling)
    return {
        **shared,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_theta_sliding": local if has_own else None,
        "qk_norm": "head",
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    local = config.rope_theta if config.rope_theta_sliding is None else config.rope_theta_sliding
    return {**gemma2.write_shared(config), "rope_local_base_freq": local}


FAMILY = dataclasses.replace(
    gemma2.FAMILY,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    read_config=read_config,
    write_config=write_config,
    block=(*gemma2.BLOCK, *qwen3.QK_NORMS),
)
