"""Runs a function on a mesh and looks at what was traced."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BATCH = ("data", "fsdp", "expert")


def run_on(mesh: Mesh, function: Callable[..., Any], *inputs: tuple[np.ndarray, PartitionSpec]) -> Any:
    """``function`` jitted on ``mesh``, every input placed as its spec says."""
    with jax.set_mesh(mesh):
        return jax.jit(function)(*(jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in inputs))


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a jaxpr, those of the jaxprs inside its equations too."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from equations(value)


def shapes(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shape of every result in a jaxpr."""
    for equation in equations(jaxpr):
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())


def count(jaxpr: Any, primitive: str) -> int:
    """How many equations of a jaxpr are ``primitive``; the body of a scan counts once."""
    return sum(equation.primitive.name == primitive for equation in equations(jaxpr))


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.ClosedJaxpr | core.Jaxpr)


def assert_trees_close(found: Any, expected: Any, tolerance: float) -> None:
    """Every leaf equal within ``tolerance`` of the largest value of the expected one."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(np.abs(b).max())))
