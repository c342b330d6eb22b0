"""How a state lies in a checkpoint: a flat dictionary of arrays by path, in one part for each top-level key."""

import typing

import jax
import orbax.checkpoint as ocp
from etils import epath

from lmjax.paths import as_path

CHUNK_BYTES = 1 << 24
"""The largest chunk of an array in a checkpoint, before compression: what is needed to read any part of it.

glibc keeps blocks of less than 32 MiB for the next one of their size; larger ones come from the kernel, and are cleared
page by page, each time.
"""
MIN_ROW_BYTES = 1 << 20
"""Arrays are cut between the slices of their first dimension where these have as many bytes."""


def absolute(directory: epath.PathLike) -> epath.Path:
    """The path as Orbax wants it: on a local disk from the root, in an object store as it is."""
    path = as_path(directory)
    return path if path.is_absolute() else path.absolute()


def flatten(state: typing.Any) -> dict[str, typing.Any]:
    """The leaves of a pytree by their paths, such as ``params/embed/table``: what is on disk knows no node types.

    Raises TypeError for a leaf that is not a jax array of numbers: Orbax writes NumPy scalars and random keys in forms
    that do not come back as they were.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    arrays = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(arrays) == len(leaves), "two leaves of the state have one path"
    assert "" not in arrays, "the root of the state is a leaf and has no name"
    for name, leaf in arrays.items():
        is_array = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
        if not is_array or jax.numpy.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(f"{name} is {type(leaf).__name__} {leaf!r}; a checkpoint holds jax arrays of numbers")
    return arrays


def split_parts(arrays: dict[str, typing.Any]) -> dict[str, dict[str, typing.Any]]:
    """The leaves by the first key of their path: each part has files of its own, so that one can be read alone."""
    parts: dict[str, dict[str, typing.Any]] = {}
    for name, leaf in arrays.items():
        parts.setdefault(name.split("/")[0], {})[name] = leaf
    return parts


def save_args(array: jax.Array) -> ocp.SaveArgs:
    """How an array is cut into chunks: layer by layer where it is a stack of matrices."""
    if array.nbytes <= CHUNK_BYTES:
        return ocp.SaveArgs()
    is_stack = array.ndim > 2 and array.nbytes >= MIN_ROW_BYTES * array.shape[0]
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if is_stack else ())


def multiprocessing_options() -> ocp.options.MultiprocessingOptions:
    """Options with which Orbax waits at barriers of ``jax.distributed``.

    It does so where the processes are named; else it runs a collective on the devices, in the midst of a step's work.
    """
    processes = set(range(jax.process_count()))
    return ocp.options.MultiprocessingOptions(active_processes=processes if len(processes) > 1 else None)


def handler(options: ocp.options.MultiprocessingOptions) -> ocp.CompositeCheckpointHandler:
    """What reads and writes the parts of a state."""
    return ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=options))
