"""The names of activations in config.json."""

import json
from collections.abc import Mapping

from lmjax.convert.settings import Settings
from lmjax.errors import InputError
from lmjax.nn.mlp import Activation

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
"""Those of transformers' ``ACT2FN`` that are one of ours; its names of one function differ in rounding alone."""


def read_activation(settings: Settings, key: str, default: str) -> Activation:
    """Ours of what ``key`` names; ``default`` where it is absent. Raises InputError for those that we do not have."""
    name = settings.take(key, default)
    if name not in ACTIVATIONS:
        raise InputError(
            f"{settings.place}: {key} is {json.dumps(name)}, which is not supported; it has to be one of "
            f"{', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def write_activation(activation: Activation, tanh: str = "gelu_pytorch_tanh") -> str:
    """The name of ours; ``tanh`` is the one that a family's published models have for ``gelu_tanh``."""
    return tanh if activation == "gelu_tanh" else activation
