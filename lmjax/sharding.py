"""From logical axes to mesh axes: two tables of rules, and a report of what they gave."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lmjax.errors import InputError
from lmjax.mesh import BATCH_AXES, FSDP_AXES

Rule = str | tuple[str, ...] | None

PARAMETER_RULES: Mapping[str, Rule] = {
    "layers": None,
    "vocab": "tensor",
    "embed": FSDP_AXES,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "latent": None,
    "latent_in": FSDP_AXES,
    "mlp": "tensor",
    "experts": "expert",
    "expert_embed": "fsdp",
    "expert_mlp": "tensor",
    "router_experts": None,
    "norm": None,
}
"""Where the dimensions of a parameter go. ``norm`` is the one dimension of a scale: small, and the same everywhere.
``latent`` is the narrow vector of latent attention as a result, ``latent_in`` the same as what comes in."""

ACTIVATION_RULES: Mapping[str, Rule] = {
    "layers": None,
    "batch": BATCH_AXES,
    "seq": None,
    "seq_residual": "tensor",
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "latent": None,
    "mlp": "tensor",
    "vocab": "tensor",
}
"""Where the dimensions of an activation go. ``seq_residual`` is the sequence of the residual stream between blocks
(sequence parallelism, arXiv 2205.05198 section 4.2.2); everywhere else a device holds whole sequences."""

REPLICATED_IF_UNEVEN = frozenset({"kv_heads", "seq_residual"})
"""Logical axes that stay whole where their size does not divide by the mesh axis: K/V heads fewer than ``tensor``, and
the single position of a decoding step. For every other axis that is an error."""


def spec(
    axes: tuple[str, ...], shape: tuple[int, ...], rules: Mapping[str, Rule], sizes: Mapping[str, int]
) -> PartitionSpec:
    """The partition of an array with logical ``axes`` and ``shape`` on a mesh whose axes have ``sizes``.

    A parameter that was stacked has one dimension more than ``axes`` for each stack; they are ``layers``.
    Raises InputError for a size that does not divide, ValueError for an unknown or doubly used axis.
    """
    axes = ("layers",) * (len(shape) - len(axes)) + tuple(axes)
    if len(axes) != len(shape):
        raise ValueError(f"logical axes {axes} do not fit shape {shape}")
    entries: list[Rule] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis not in rules:
            raise ValueError(f"unknown logical axis {axis!r}; known are {sorted(rules)}")
        entry = rules[axis]
        parts = math.prod(sizes[name] for name in _names(entry))
        if size % parts:
            if axis not in REPLICATED_IF_UNEVEN:
                over = " x ".join(name for name in _names(entry) if sizes[name] > 1)
                raise InputError(
                    f"mesh: {axis} has size {size}, which does not divide over {over} = {parts} devices: "
                    f"{size} mod {parts} = {size % parts}. Choose a mesh whose {over} divides {size}."
                )
            entry = None
        entries.append(entry)
    used = [name for entry in entries for name in _names(entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} use a mesh axis twice: {entries}")
    return PartitionSpec(*entries)


def parameter_spec(axes: tuple[str, ...], shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """The partition of a parameter by PARAMETER_RULES."""
    return spec(axes, shape, PARAMETER_RULES, sizes)


def activation_spec(axes: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """The partition of an activation by ACTIVATION_RULES on the mesh that is set (``jax.set_mesh``)."""
    return spec(axes, shape, ACTIVATION_RULES, jax.sharding.get_abstract_mesh().shape)


def batch_sharding(mesh: Mesh, num_leading: int = 0) -> NamedSharding:
    """Rows over the batch axes, after ``num_leading`` whole dimensions; what follows the rows is whole."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * num_leading, BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


class Leaf(NamedTuple):
    """One array of a tree, as a device sees it."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    bytes_per_device: int


def leaf_report(tree: Any) -> Iterator[Leaf]:
    """Every leaf (an array or a ShapeDtypeStruct with a sharding) of ``tree`` with its bytes on one device."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        shard = leaf.sharding.shard_shape(leaf.shape)
        yield Leaf(
            path=jax.tree_util.keystr(path, simple=True, separator="."),
            shape=leaf.shape,
            dtype=str(leaf.dtype),
            spec=str(leaf.sharding.spec),
            bytes_per_device=math.prod(shard) * leaf.dtype.itemsize,
        )


def _names(entry: Rule) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else entry
