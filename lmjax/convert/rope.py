"""Rotary positions in config.json: the old spelling (rope_theta, rope_scaling) and the new one (rope_parameters)."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from lmjax.convert.settings import Settings
from lmjax.errors import InputError
from lmjax.models.config import DecoderConfig
from lmjax.nn.rope_scaling import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)

SCALINGS: Mapping[str, type] = {
    "linear": LinearScaling,
    "dynamic": DynamicScaling,
    "yarn": YarnScaling,
    "longrope": LongRopeScaling,
    "llama3": Llama3Scaling,
}
KEYS = {
    "original_length": "original_max_position_embeddings",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "short_factors": "short_factor",
    "long_factors": "long_factor",
}
"""Our fields of a scaling to their names in the file, where they differ."""
OLD_NAMES = {"su": "longrope"}


def read_rope(settings: Settings, *, fraction: float = 1.0, theta: float = 10_000.0) -> dict[str, Any]:
    """The fields ``rope_theta``, ``rope_fraction`` and ``rope_scaling``, in either spelling.

    Where the file says neither, they are ``theta`` and ``fraction``, the rotated part of a head. Raises InputError for
    a scaling that is not known, has not all its numbers, or has more of them.
    """
    new, old = settings.take("rope_parameters", None), settings.take("rope_scaling", None)
    parameters = old or new or {}  # which of them counts where there are both, as in transformers
    if not isinstance(parameters, Mapping):
        raise InputError(
            f"{settings.place}: rope_scaling is {json.dumps(parameters)}; it has to be a dictionary with rope_type"
        )
    parameters = dict(parameters)
    theta = settings.take("rope_theta", None) or theta
    partial = settings.take("partial_rotary_factor", None)
    return {
        "rope_theta": float(parameters.pop("rope_theta", None) or theta),
        "rope_fraction": float(parameters.pop("partial_rotary_factor", None) or partial or fraction),
        "rope_scaling": read_scaling(settings, parameters),
    }


def read_whole_rope(settings: Settings, *, theta: float = 10_000.0) -> dict[str, Any]:
    """``read_rope`` where transformers turns whole heads, whatever ``partial_rotary_factor`` says.

    Raises InputError where it says less.
    """
    fields = read_rope(settings, theta=theta)
    if fields["rope_fraction"] != 1:
        raise InputError(
            f"{settings.place}: partial_rotary_factor is {fields['rope_fraction']}, which is not supported: in this "
            "family it has no effect in transformers, so remove it from the file, or set it to 1"
        )
    return fields


def read_scaling(settings: Settings, parameters: dict[str, Any]) -> RopeScaling | None:
    """What a dictionary with ``rope_type`` (or ``type``) says, without theta and fraction."""
    parameters = dict(parameters)
    old, new = parameters.pop("type", None), parameters.pop("rope_type", None)
    name = new or old or "default"
    name = OLD_NAMES.get(name, name)
    if name == "default":
        _refuse_rest(settings, name, parameters)
        return None
    if name not in SCALINGS:
        raise InputError(
            f"{settings.place}: rope_type {json.dumps(name)} is not supported; these are: default, "
            f"{', '.join(SCALINGS)}"
        )
    longest = settings.take("max_position_embeddings")
    found: dict[str, Any] = {}
    fields = {field.name for field in dataclasses.fields(SCALINGS[name])} - {"kind"}
    if "original_length" in fields:
        beside = settings.take("original_max_position_embeddings", None)
        within = parameters.pop("original_max_position_embeddings", None)
        # transformers takes the length of the model for the one that dynamic scaling was trained on.
        found["original_length"] = longest if name == "dynamic" else beside or within or longest
    if name == "yarn":
        parameters["attention_factor"] = _yarn_attention_factor(parameters)
    if name == "longrope":
        factor = parameters.pop("factor", None) or longest / found["original_length"]
        given = parameters.pop("attention_factor", None)
        found["attention_factor"] = given or _longrope_attention_factor(factor, found["original_length"])
    for field in fields - found.keys():
        value = parameters.pop(KEYS.get(field, field), None)
        if value is not None:
            found[field] = tuple(map(float, value)) if isinstance(value, list) else _number(value)
    _refuse_rest(settings, name, parameters)
    try:
        return SCALINGS[name](**found)
    except InputError as error:
        raise InputError(f"{settings.place}: rope_type {name}: {error}") from None


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _longrope_attention_factor(factor: float, original_length: int) -> float:
    """As transformers' ``_compute_longrope_parameters`` has it."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_length))


def _yarn_attention_factor(parameters: dict[str, Any]) -> float | None:
    """As transformers' ``_compute_yarn_parameters`` has it; the keys of DeepSeek are taken out."""
    given, mscale, of_all = (parameters.pop(key, None) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is None and mscale and of_all:
        return yarn_mscale(parameters["factor"], mscale) / yarn_mscale(parameters["factor"], of_all)
    return given


def yarn_mscale(factor: float, weight: float) -> float:
    """By how much longer rows sharpen attention: YaRN's temperature (arXiv 2309.00071, equation 22), weighted."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _refuse_rest(settings: Settings, name: str, parameters: Mapping[str, Any]) -> None:
    rest = {key: value for key, value in parameters.items() if value is not None}
    if rest:
        raise InputError(
            f"{settings.place}: the rotary positions of rope_type {name} have keys that are not understood: "
            f"{json.dumps(rest)}; remove those that have no effect from the file, and convert again"
        )


def write_rope(config: DecoderConfig) -> dict[str, Any]:
    """The keys in the old spelling, which transformers 4 and 5 both read."""
    keys: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_scaling": None}
    if config.rope_fraction != 1:
        keys["partial_rotary_factor"] = config.rope_fraction
    if (scaling := config.rope_scaling) is not None:
        keys["rope_scaling"] = write_scaling(scaling)
    if isinstance(scaling, LongRopeScaling):
        by_length = _longrope_attention_factor(config.max_length / scaling.original_length, scaling.original_length)
        if scaling.attention_factor == by_length:  # which is what files without it mean
            del keys["rope_scaling"]["attention_factor"]
    return keys


def write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """What ``read_scaling`` reads."""
    keys: dict[str, Any] = {}
    for field in dataclasses.fields(scaling):  # pyright: ignore[reportArgumentType]
        value = getattr(scaling, field.name)
        if value is not None and not (field.name == "original_length" and isinstance(scaling, DynamicScaling)):
            name = "rope_type" if field.name == "kind" else KEYS.get(field.name, field.name)
            keys[name] = list(value) if isinstance(value, tuple) else value
    return keys
