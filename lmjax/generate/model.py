"""What generation and scoring have to know of a model, and how rows get to its devices and back."""

from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lmjax.models.decoder import Decoder, DecoderConfig
from lmjax.sharding import batch_sharding


class Model(Protocol):
    """A decoder on a mesh; ``lmjax.train.state.Blueprint`` is one."""

    @property
    def config(self) -> DecoderConfig: ...

    @property
    def mesh(self) -> Mesh: ...

    def decoder(self, params: Any) -> Decoder:
        """The module whose parameters are ``params``."""
        ...


def place(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array of which every process holds all values, on the devices of all of them."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def place_rows(value: np.ndarray, mesh: Mesh) -> jax.Array:
    """(rows, ...) split over the batch axes of ``mesh``."""
    return place(value, batch_sharding(mesh))
