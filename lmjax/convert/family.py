"""What a family's table says, and the parts of a decoder that tables name."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lmjax.convert.layouts import Experts, Rows
from lmjax.convert.settings import Settings
from lmjax.errors import InputError
from lmjax.models.config import DecoderConfig

SUFFIXES = {
    "kernel": "weight",
    "matrix": "weight",
    "scale": "weight",
    "bias": "bias",
    "table": "weight",
    "choice_bias": "e_score_correction_bias",
}
"""The last name of a parameter, with us and in the files."""
IN_FLOAT32 = frozenset({"choice_bias"})
"""Those whose tensors are float32 whatever the others are: rounding them would change what is chosen."""

LINEAR = Rows(num_inputs=1)
"""(out, in), as torch.nn.Linear."""
LINEAR_OUT = Rows(num_inputs=2)
"""The same for attention's output projection, whose inputs are heads and head_dim."""
CONV1D = Rows(num_inputs=1, input_first=True)
CONV1D_OUT = Rows(num_inputs=2, input_first=True)
GROUPED = Rows(num_inputs=1, order="grouped")
VECTOR = Rows(num_inputs=0)


@dataclasses.dataclass(frozen=True)
class Part:
    """A module of the files, and the modules of a block of ours that it holds."""

    theirs: str
    """With {} for the number of an expert, where each expert has a module of its own."""
    ours: tuple[str, ...]
    """Paths such as ``attention/query``, in the order of ``layout``."""
    layout: Rows | Experts = VECTOR
    """Of the weight; a bias has the same order, without inputs."""
    is_tensor: bool = False
    """Whether ``theirs`` is the name of a tensor as it is, without .weight or .bias."""


QKV = ("attention/query", "attention/key", "attention/value")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the map between Hugging Face models and our decoder, for both directions."""

    model_type: str
    """As in config.json."""
    architecture: str
    """The class that transformers loads it with."""
    read_config: Callable[[Settings], dict[str, Any]]
    """Fields of DecoderConfig from config.json. Raises InputError for what the decoder cannot do."""
    write_config: Callable[[DecoderConfig], dict[str, Any]]
    """The keys that ``read_config`` reads. Where it does not read the same config back from them, the decoder is not
    one of this family, so that it need not look at what the family does not have."""
    block: tuple[Part, ...] | Callable[[DecoderConfig], tuple[Part, ...]]
    """All modules that a block may have; those that a config's block lacks are not in its files either. A function,
    where the names depend on the config."""
    layer: str
    """The name of a block in the files, with {} for its number."""
    embed: str
    final_norm: str
    head: str = "lm_head"
    embed_norm: str | None = None
    position: str | None = None
    position_offset: int = 0
    """Rows of the position table before that of position 0."""
    ignored: tuple[str, ...] = ()
    """Regular expressions of tensors that some files have and that hold nothing: masks, frequencies."""
    further_layers: str | None = None
    """The key that counts layers after the last one, for the prediction of further tokens; these are left out."""


def norm(ours: str, theirs: str) -> Part:
    return Part(theirs, (ours,))


def linear(ours: str, theirs: str) -> Part:
    return Part(theirs, (ours,), LINEAR_OUT if ours == "attention/out" else LINEAR)


Fields = Mapping[str, str]
"""Our field of a config to their key, where the values are the same."""


def read_fields(settings: Settings, fields: Fields) -> dict[str, Any]:
    found = {ours: settings.take(theirs) for ours, theirs in fields.items()}
    for ours, value in found.items():
        if value is None:
            raise InputError(f"{settings.place}: {fields[ours]} is null; a config.json of this family has a value")
    return found


def write_fields(config: DecoderConfig, fields: Fields) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for ours, theirs in fields.items()}


def head_dim_of(fields: Mapping[str, Any]) -> int:
    """The width of a head where all heads together are as wide as the residual stream.

    At least 1: DecoderConfig refuses what does not divide.
    """
    return max(1, fields["embed_dim"] // max(1, fields["num_heads"]))
