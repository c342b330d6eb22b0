"""A family's table for one model: which tensor of the files holds which slices of our parameters, and how."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from lmjax.convert.family import SUFFIXES, VECTOR, Family, Part
from lmjax.convert.layouts import Layout, Rows, Shape, Table
from lmjax.models.config import DecoderConfig
from lmjax.models.shapes import parameter_shapes


class Slice(NamedTuple):
    """A slice of one of our parameters: all of it, what belongs to one block, or to one expert of a block."""

    path: str
    """The parameter, such as ``segments/0/blocks/0/mlp/up/kernel``."""
    index: tuple[int, ...]
    """Of the block, and of the expert, along the dimensions that they are stacked along; () is the whole parameter."""
    shape: Shape
    """Without those dimensions."""


class Piece(NamedTuple):
    """A tensor of the files and all that it holds."""

    name: str
    shape: Shape
    parts: tuple[Slice, ...]
    layout: Layout


def pieces(family: Family, config: DecoderConfig) -> list[Piece]:
    """Every tensor of the model's files, in the order of the layers; every slice of our parameters is in one piece.

    A tied output table is not among them.
    """
    shapes = parameter_shapes(config)
    found = list(_pieces(family, config, shapes))
    held = [(part.path, part.index) for piece in found for part in piece.parts]
    whole = {path for path, index in held if not index}
    stacked = {path for path, index in held if index}
    assert len(held) == len(set(held)), "two tensors hold one slice"
    assert whole | stacked == set(shapes), f"no tensor holds {sorted(set(shapes) - whole - stacked)}"
    return found


def _pieces(family: Family, config: DecoderConfig, shapes: dict[str, Shape]) -> Iterator[Piece]:
    def outside(theirs: str | None, ours: str, layout: Layout | None = None) -> Iterator[Piece]:
        for leaf, suffix in SUFFIXES.items():
            path = f"{ours}/{leaf}"
            if path in shapes:
                assert theirs is not None, f"the family has no name for {ours}"
                yield _piece(f"{theirs}.{suffix}", layout or VECTOR, [Slice(path, (), shapes[path])])

    vocabulary = Table(num_rows=config.vocab_size)
    yield from outside(family.embed, "embed", vocabulary)
    positions = Table(num_rows=config.max_length, before=family.position_offset)
    yield from outside(family.position, "position", positions)
    yield from outside(family.embed_norm, "embed_norm")
    parts = family.block(config) if callable(family.block) else family.block
    for layer, (prefix, index) in enumerate(_blocks(config)):
        for part in parts:
            yield from _of_block(part, f"{family.layer.format(layer)}.{part.theirs}", prefix, index, shapes)
    yield from outside(family.final_norm, "final_norm")
    yield from outside(family.head, "head", vocabulary)
    if "head_bias" in shapes:
        yield _piece(f"{family.head}.bias", vocabulary, [Slice("head_bias", (), shapes["head_bias"])])


def _of_block(part: Part, theirs: str, prefix: str, block: int, shapes: dict[str, Shape]) -> Iterator[Piece]:
    """The tensors of a module of a block, all experts' weights of one kind one after the other."""
    for leaf, suffix in SUFFIXES.items():
        paths = [f"{prefix}/{ours}/{leaf}" for ours in part.ours]
        present = [path for path in paths if path in shapes]
        if not present:
            continue
        assert present == paths, f"{part.theirs} holds {paths}, of which some are not there"
        layout: Layout = part.layout
        if isinstance(layout, Rows) and leaf not in ("kernel", "matrix"):
            layout = Rows(num_inputs=0, order=layout.order)
        name = theirs if part.is_tensor else f"{theirs}.{suffix}"
        if "{}" not in name:
            yield _piece(name, layout, [Slice(path, (block,), shapes[path][1:]) for path in paths])
            continue
        for expert in range(shapes[paths[0]][1]):
            slices = [Slice(path, (block, expert), shapes[path][2:]) for path in paths]
            yield _piece(name.format(expert), layout, slices)


def _piece(name: str, layout: Layout, slices: list[Slice]) -> Piece:
    return Piece(name, layout.shape([part.shape for part in slices]), tuple(slices), layout)


def _blocks(config: DecoderConfig) -> Iterator[tuple[str, int]]:
    """The path of every block, from the first layer to the last, and its place along the stacked dimension."""
    for number, segment in enumerate(config.segments):
        for repeat in range(segment.repeats):
            for place in range(len(segment.pattern)):
                yield f"segments/{number}/blocks/{place}", repeat


def is_ignored(family: Family, name: str) -> bool:
    """Whether a tensor of the files is one that holds nothing."""
    return any(re.fullmatch(pattern, name) for pattern in family.ignored)


def is_of_further_layer(family: Family, config: DecoderConfig, name: str) -> bool:
    """Whether a tensor of the files is of a layer after the last one, as some families have them."""
    before, after = family.layer.split("{}")
    found = re.match(rf"{re.escape(before)}(\d+){re.escape(after)}\.", name)
    return family.further_layers is not None and found is not None and int(found[1]) >= config.num_layers
