"""Parameters to begin with that are those of another model (``train.init_from``)."""

import dataclasses
from typing import Any

from lmjax.convert.resemblance import resolved
from lmjax.convert.weights import Saved, open_weights
from lmjax.errors import InputError
from lmjax.models.config import DecoderConfig
from lmjax.train.state import PlacedModel


def check_initial(path: str, config: DecoderConfig) -> None:
    """Raises InputError where there is no model in ``path``, or not the one that ``config`` describes.

    Dropout may differ, and the longest row, but for models with a table of positions.
    """
    weights = open_weights(path)
    there, here = _compared(weights.config, config), _compared(config, config)
    fields = [field.name for field in dataclasses.fields(here)]  # pyright: ignore[reportArgumentType]
    differing = [
        f"  model.{name}: {getattr(there, name)!r} there, {getattr(here, name)!r} in the config"
        for name in fields
        if getattr(there, name) != getattr(here, name)
    ]
    if differing:
        imported = isinstance(weights, Saved) and weights.huggingface is not None
        file = f"{path}/model.yaml" if imported else "the model.yaml that `lmjax convert import` writes"
        raise InputError(
            "\n".join([f"train.init_from: {path} is another model than the config's:", *differing])
            + f"\nGive the model section the same values; {file} can be a `base:` of the config."
        )


def _compared(config: DecoderConfig, wanted: DecoderConfig) -> DecoderConfig:
    """With the fields that may differ made equal, but the pattern of layers as it is: parameters are stacked by it."""
    changes: dict[str, Any] = {"layer_pattern": config.layer_pattern}
    if config.position != "learned":
        changes["max_length"] = wanted.max_length
    return dataclasses.replace(resolved(config), **changes)  # pyright: ignore[reportArgumentType]


def initial_params(path: str, model: PlacedModel) -> Any:
    """The parameters of the model in ``path``, on the mesh. Every process calls it."""
    return open_weights(path).place(model.params)
