"""Parameters to begin with that are those of another model (``train.init_from``)."""

import dataclasses
from typing import Any

from lmjax.convert.resemblance import differing_fields
from lmjax.convert.weights import Saved, open_weights
from lmjax.errors import InputError
from lmjax.models.config import DecoderConfig
from lmjax.train.state import PlacedModel


def check_initial(path: str, config: DecoderConfig) -> None:
    """Raises InputError where there is no model in ``path``, or not the one that ``config`` describes.

    Dropout may differ, and the longest row, but for models with a table of positions.
    """
    weights = open_weights(path)
    source = weights.config
    if source.position != "learned":
        source = dataclasses.replace(source, max_length=config.max_length)  # pyright: ignore[reportArgumentType]
    found = differing_fields(source, config)
    if not found and source.segments != config.segments:  # the same layers, stacked in another way
        found = [("layer_pattern", source.layer_pattern, config.layer_pattern)]
    differing = [f"  model.{name}: {there!r} there, {here!r} in the config" for name, there, here in found]
    if differing:
        imported = isinstance(weights, Saved) and weights.huggingface is not None
        file = f"{path}/model.yaml" if imported else "the model.yaml that `lmjax convert import` writes"
        raise InputError(
            "\n".join([f"train.init_from: {path} is another model than the config's:", *differing])
            + f"\nGive the model section the same values; {file} can be a `base:` of the config."
        )


def initial_params(path: str, model: PlacedModel) -> Any:
    """The parameters of the model in ``path``, on the mesh. Every process calls it."""
    return open_weights(path).place(model.params)
