"""The state of a run, as a plain tree of arrays, and where each leaf of it lies."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from lmjax.models.decoder import Decoder, DecoderConfig
from lmjax.optim import OptimizerConfig, make_optimizer, make_schedule
from lmjax.sharding import parameter_spec, replicated

HOST_MEMORY = "pinned_host"
"""The memory of a device's host that the device itself reads and writes, as JAX calls it."""


class TrainState(NamedTuple):
    """Everything that an update reads and writes."""

    step: Any
    """Finished updates, int32."""
    params: Any
    """float32 parameters, nested dicts as the decoder's attributes are."""
    opt_state: Any
    """optax's state."""


@dataclasses.dataclass(frozen=True)
class PlacedModel:
    """A decoder on a mesh, without its parameters."""

    config: DecoderConfig
    mesh: Mesh
    graphdef: Any
    params: Any
    """ShapeDtypeStructs with shardings, nested dicts as the decoder's attributes are."""

    def decoder(self, params: Any) -> Decoder:
        """The module whose parameters are ``params``."""
        return nnx.merge(self.graphdef, params)


@dataclasses.dataclass(frozen=True)
class Blueprint(PlacedModel):
    """What a run's state looks like before any of it exists."""

    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    state: TrainState
    """ShapeDtypeStructs with shardings."""
    moments_on_host: bool


def place_model(config: DecoderConfig, mesh: Mesh) -> PlacedModel:
    """Raises InputError where the mesh does not divide the model."""
    return PlacedModel(config, mesh, *abstract_decoder(config, mesh))


def abstract_decoder(config: DecoderConfig, mesh: Mesh) -> tuple[Any, Any]:
    """The decoder's graph definition, and its parameters as ShapeDtypeStructs with their shardings on ``mesh``."""
    graphdef, variables = _variables(config)

    def struct(variable):
        value = variable.get_value()
        partition = parameter_spec(variable.axes, value.shape, mesh.shape)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(mesh, partition))

    structs = jax.tree.map(struct, variables, is_leaf=_is_variable)
    return graphdef, nnx.to_pure_dict(structs)


class Declared(NamedTuple):
    """A parameter as its module declares it."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    """With a first dimension of layers where it is stacked."""
    axes: tuple[str, ...]
    """Logical ones, without that dimension."""


def declared_parameters(config: DecoderConfig) -> tuple[Declared, ...]:
    """All parameters of the decoder, wherever they may lie."""
    _, variables = _variables(config)
    found = jax.tree_util.tree_leaves_with_path(variables, is_leaf=_is_variable)
    return tuple(
        Declared(tuple(str(entry.key) for entry in path), variable.get_value().shape, variable.axes)
        for path, variable in found
    )


@functools.lru_cache(maxsize=8)
def _variables(config: DecoderConfig) -> tuple[Any, Any]:
    """The graph definition and the variables, whose values are ShapeDtypeStructs."""
    return nnx.split(jax.eval_shape(lambda key: Decoder(config, key=key), jax.random.key(0)))


def decay_mask(config: DecoderConfig) -> Any:
    """Which parameters are decayed: matrices and tables; not norms, biases and sinks, whatever their dimensions."""
    _, variables = _variables(config)
    named = nnx.to_pure_dict(jax.tree.map(lambda variable: True, variables, is_leaf=_is_variable))
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("kernel", "table"), named)


def make_blueprint(
    config: DecoderConfig, optimizer: OptimizerConfig, num_steps: int, mesh: Mesh, *, moments_on_host: bool = False
) -> Blueprint:
    """``moments_on_host`` puts them into HOST_MEMORY. Raises InputError where the mesh does not divide the model."""
    graphdef, params = abstract_decoder(config, mesh)
    schedule = make_schedule(optimizer, num_steps)
    transformation = make_optimizer(optimizer, schedule, decay_mask(config))

    def struct(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    kind = HOST_MEMORY if moments_on_host else None
    shardings = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind(kind), params)
    plain = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    opt_state = optax.tree_utils.tree_map_params(
        transformation,
        struct,
        jax.eval_shape(transformation.init, plain),
        shardings,
        transform_non_params=lambda leaf: struct(leaf, replicated(mesh)),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    state = TrainState(step, params, opt_state)
    return Blueprint(config, mesh, graphdef, params, transformation, schedule, state, moments_on_host)


def init_state(blueprint: Blueprint, seed: int) -> TrainState:
    """The state before the first update, the same bits on every mesh.

    Every device computes its own part only: the mesh must not be set here, or each would build whole arrays.
    """

    def init(key):
        params = nnx.to_pure_dict(nnx.split(Decoder(blueprint.config, key=key))[1])
        return TrainState(jnp.zeros((), jnp.int32), params, blueprint.optimizer.init(params))

    shardings = jax.tree.map(lambda leaf: leaf.sharding, blueprint.state)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def fetched(blueprint: Blueprint, opt_state: Any) -> Any:
    """The optimizer's state with all of it in the devices' memory; inside of a jitted function."""
    return _moved(blueprint, opt_state, jax.memory.Space.Device)


def put_away(blueprint: Blueprint, opt_state: Any) -> Any:
    """The reverse of ``fetched``."""
    return _moved(blueprint, opt_state, jax.memory.Space.Host)


def _moved(blueprint: Blueprint, opt_state: Any, space: Any) -> Any:
    if not blueprint.moments_on_host:
        return opt_state
    # Not by the shardings of the blueprint: GPUs that are not here are said to have no memories, and theirs forget it.
    return optax.tree_utils.tree_map_params(blueprint.optimizer, lambda leaf: jax.device_put(leaf, space), opt_state)


def state_from(blueprint: Blueprint, params: Any) -> TrainState:
    """The state before the first update, with these parameters, which are placed as ``blueprint.params`` says."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, blueprint.state)
    rest = (shardings.step, shardings.opt_state)
    init = jax.jit(lambda params: (jnp.zeros((), jnp.int32), blueprint.optimizer.init(params)), out_shardings=rest)
    step, opt_state = init(params)
    return TrainState(step, params, opt_state)


def _is_variable(value: Any) -> bool:
    return isinstance(value, nnx.Variable)
