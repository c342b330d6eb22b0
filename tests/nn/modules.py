"""A module as a function of its parameters, and on a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from lmjax.sharding import parameter_spec


def as_function(module: nnx.Module) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    """What makes the module of its parameters, and these as nested dicts."""
    graphdef, variables = nnx.split(module)
    return lambda parameters: nnx.merge(graphdef, parameters), nnx.to_pure_dict(variables)


def on_mesh(module: nnx.Module, mesh: Mesh) -> Any:
    """The module with every parameter placed as its axes say."""
    graphdef, variables = nnx.split(module)

    def place(variable):
        value = np.asarray(variable.get_value())
        return jax.device_put(value, NamedSharding(mesh, parameter_spec(variable.axes, value.shape, mesh.shape)))

    placed = jax.tree.map(place, variables, is_leaf=lambda value: isinstance(value, nnx.Variable))
    return nnx.merge(graphdef, nnx.to_pure_dict(placed))
