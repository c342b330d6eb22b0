"""Parameters as decoding reads them, made once for many tokens.

A step of decoding reads every parameter and does little else, so what is done to a parameter in each step costs as much
as the product with it: a cast to the compute dtype and, on a CPU, the copy of a layer's slice of the stack.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lmjax.models.decoder import Execution
from lmjax.models.remat import RematConfig

IN_PRODUCTS = ("kernel", "table")
"""Parameters that the decoder casts to the compute dtype wherever it reads them."""

WORTH_COMPILING = 1_700_000_000
"""On a CPU, a layer that is compiled on its own takes as much longer as copying so many bytes of parameters."""


def prepared(params: Any, execution: Execution, num_steps: int) -> Any:
    """The parameters for ``num_steps`` steps, as ``whole`` takes them: cast and, where that is worth it, in layers.

    A CPU copies a layer's slice of the stacked parameters before it multiplies with it; other devices read it in place.
    The layers take no memory: they lie where the stack does, as long as nothing was cast.
    """

    def cast(path, leaf: jax.Array) -> jax.Array:
        return leaf.astype(execution.compute_dtype) if path[-1].key in IN_PRODUCTS else leaf

    layer_bytes = sum(leaf.nbytes // leaf.shape[0] for leaf in jax.tree.leaves(params["segments"]))
    if execution.compute_dtype != jnp.float32:
        params = jax.jit(functools.partial(jax.tree_util.tree_map_with_path, cast))(params)
    if execution.hardware.platform != "cpu" or layer_bytes * num_steps < WORTH_COMPILING:
        return params
    return params | {"segments": jax.tree.map(_layers, params["segments"])}


def whole(prepared: Any) -> Any:
    """The tree that the decoder takes, made inside of the step that reads it: of a slice of what is stacked here the
    compiler makes the layer itself."""
    segments = jax.tree.map(
        lambda node: jnp.stack(node) if _is_apart(node) else node, prepared["segments"], is_leaf=_is_apart
    )
    return prepared | {"segments": segments}


def decoding(prepared: Any, execution: Execution) -> Execution:
    """How the decoder runs with these parameters."""
    apart = any(map(_is_apart, jax.tree.leaves(prepared["segments"], is_leaf=_is_apart)))
    scan_layers = execution.scan_layers and not apart
    return dataclasses.replace(execution, scan_layers=scan_layers, remat=RematConfig(policy="none"))


def _is_apart(node: Any) -> bool:
    return isinstance(node, tuple)


def _layers(stacked: jax.Array) -> tuple[jax.Array, ...]:
    """The slices along the first dimension, which is whole on every device, as views of the memory of ``stacked``."""
    assert isinstance(stacked.sharding, NamedSharding)
    sharding = NamedSharding(stacked.sharding.mesh, PartitionSpec(*stacked.sharding.spec[1:]))
    shards = [(np.asarray(shard.data), shard.device) for shard in stacked.addressable_shards]

    def layer(index: int) -> jax.Array:
        parts = [jax.device_put(values[index], device) for values, device in shards]
        return jax.make_array_from_single_device_arrays(stacked.shape[1:], sharding, parts)

    return tuple(layer(index) for index in range(stacked.shape[0]))
