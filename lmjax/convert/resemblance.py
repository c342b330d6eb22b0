"""Which family of Hugging Face has a decoder as ours."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from lmjax.convert.experts import mlp_kinds, mlp_pattern
from lmjax.convert.families import FAMILIES
from lmjax.convert.family import Family
from lmjax.convert.source import read_model
from lmjax.errors import InputError
from lmjax.models.config import DecoderConfig
from lmjax.nn.moe import MoEConfig

SHOWN = 5


def choose_family(config: DecoderConfig, first: Family | None = None) -> Family:
    """``first`` if it has such a decoder, or else the first of FAMILIES that has.

    Raises InputError where none has, with the fields in which the closest one differs.
    """
    closest: tuple[Family, list[str]] | None = None
    for family in _unique([first] if first else [], FAMILIES.values()):
        differing = differences(family, config)
        if differing == []:
            return family
        if differing is not None and (closest is None or len(differing) < len(closest[1])):
            closest = family, differing
    if closest is None:
        raise InputError("no Hugging Face family that lmjax writes has such a model; nothing can be exported")
    family, differing = closest
    more = f"\n  and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    lines = "\n".join(f"  {line}" for line in differing[:SHOWN])
    raise InputError(
        f"no Hugging Face family has such a model. The closest is {family.model_type}, which differs in:\n"
        f"{lines}{more}\n"
        f"A model to be exported has to be one of: {', '.join(sorted(FAMILIES))}."
    )


def differences(family: Family, config: DecoderConfig) -> list[str] | None:
    """The fields of ``config`` that come back as others from the family's config.json; None where none comes back."""
    try:
        read = read_model(family, family.write_config(config), family.model_type)
    except InputError:
        return None
    return [f"{name}: {ours!r}, and there {theirs!r}" for name, ours, theirs in differing_fields(config, read)]


def differing_fields(one: DecoderConfig, other: DecoderConfig) -> list[tuple[str, Any, Any]]:
    """The fields in which two trained models differ, with both values, as ``resolved`` has them."""
    first, second = resolved(one), resolved(other)
    found = _differing(first, second)
    if first.moe is None or second.moe is None:
        return found
    of_experts = [(f"moe.{name}", left, right) for name, left, right in _differing(first.moe, second.moe)]
    return [field for field in found if field[0] != "moe"] + of_experts


def _differing(first: Any, second: Any) -> list[tuple[str, Any, Any]]:
    names = [field.name for field in dataclasses.fields(first)]
    pairs = ((name, getattr(first, name), getattr(second, name)) for name in names)
    return [(name, left, right) for name, left, right in pairs if left != right]


def resolved(config: DecoderConfig) -> DecoderConfig:
    """The same trained model with nothing left to defaults, and with the shortest pattern of layers."""
    pattern = config.layer_pattern
    kinds = tuple(pattern[layer % len(pattern)] for layer in range(config.num_layers))
    lengths = range(1, len(kinds) + 1)
    shortest = next(n for n in lengths if all(kind == kinds[layer % n] for layer, kind in enumerate(kinds)))
    changes: dict[str, Any] = {
        "num_kv_heads": config.kv_heads,
        "head_dim": config.head_width,
        "query_scale": config.attention("full").query_scale,
        "layer_pattern": kinds[:shortest],
        "moe": None if config.moe is None else _resolved_experts(config, config.moe),
        "dropout": 0.0,
        "init": "gpt2",
    }
    return dataclasses.replace(config, **changes)  # pyright: ignore[reportArgumentType]


def _resolved_experts(config: DecoderConfig, moe: MoEConfig) -> MoEConfig:
    """A softmax of the chosen logits is one of all, divided by the sum of the chosen; what is of training is left out,
    and so is the capacity, which generation has not."""
    kinds = mlp_kinds(config)
    untrained = MoEConfig(num_experts=1, experts_per_token=1)
    names = ("jitter", "capacity_factor", "balance_weight", "balance_over", "z_weight")
    changes: dict[str, Any] = {
        **{name: getattr(untrained, name) for name in names},
        **mlp_pattern(kinds),
        "expert_dim": config.expert_dim if "dense" in kinds else None,
        "softmax_over": "all",
        "renormalize": moe.renormalize or moe.softmax_over == "chosen",
        "choice_bias_rate": None if moe.choice_bias_rate is None else 0.0,
    }
    if moe.groups == moe.top_groups:
        changes |= {"groups": 1, "top_groups": 1}
    return dataclasses.replace(moe, **changes)  # pyright: ignore[reportArgumentType]


def is_unchanged(family: Family, settings: Mapping[str, Any], config: DecoderConfig) -> bool:
    """Whether a config.json describes this model."""
    if settings.get("model_type") != family.model_type:
        return False
    try:
        return resolved(read_model(family, settings, family.model_type)) == resolved(config)
    except InputError:
        return False


def _unique(*groups: Iterable[Family]) -> list[Family]:
    return list({family.model_type: family for group in groups for family in group}.values())
