"""Sliding windows in config.json: ``sliding_window``, and which layers have it."""

from collections.abc import Sequence
from typing import Any

from lmjax.convert.settings import Settings
from lmjax.errors import InputError
from lmjax.models.config import AttentionKind, DecoderConfig

KINDS: dict[str, AttentionKind] = {"full_attention": "full", "sliding_attention": "sliding"}
"""The entries of ``layer_types``."""


def read_windows(settings: Settings, kinds: Sequence[str], window: int | None) -> dict[str, Any]:
    """The fields ``layer_pattern``, the shortest one that gives ``layer_types``, and ``sliding_window``.

    ``kinds`` of the layers hold where the file does not name them. Raises InputError for kinds that are not known, for
    too many or too few of them, and for sliding ones without a window.
    """
    num_layers = settings.take("num_hidden_layers")
    kinds = settings.take("layer_types", None) or kinds
    if unknown := sorted(set(kinds) - KINDS.keys()):
        raise InputError(
            f"{settings.place}: layer_types has {', '.join(unknown)}, which is not supported; they have to be "
            f"{' or '.join(KINDS)}"
        )
    if len(kinds) != num_layers:
        raise InputError(f"{settings.place}: layer_types has {len(kinds)} entries for {num_layers} layers; correct it")
    if "sliding_attention" not in kinds:
        return {"layer_pattern": ("full",), "sliding_window": None}
    if window is None:
        raise InputError(f"{settings.place}: layer_types has sliding_attention and sliding_window is null; set it")
    blocks = [KINDS[kind] for kind in kinds]
    lengths = range(1, num_layers + 1)
    shortest = next(n for n in lengths if all(kind == blocks[i % n] for i, kind in enumerate(blocks)))
    return {"layer_pattern": tuple(blocks[:shortest]), "sliding_window": window}


def write_layer_types(config: DecoderConfig) -> list[str]:
    """``layer_types``: that of every layer."""
    blocks = [kind.attention for kind in config.blocks]
    return [f"{kind}_attention" for kind in blocks]
