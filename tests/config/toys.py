"""Small config classes with everything that the real ones have: sections, kinds, lists, choices, conflicts."""

from typing import Annotated, Literal

import pydantic

from lmjax.schema import config_class


@config_class
class Ball:
    """A toy."""

    kind: Literal["ball"] = "ball"
    """Tells it from the others."""
    radius: float
    """Centimetres."""
    colour: Literal["red", "green"] = "red"
    """What it looks like."""


@config_class
class Blocks:
    """Another toy."""

    kind: Literal["blocks"] = "blocks"
    """Tells it from the others."""
    sizes: tuple[int, ...] = ()
    """Edges in centimetres."""


Toy = Annotated[Ball | Blocks, pydantic.Field(discriminator="kind")]


@config_class
class Shelf:
    """Where toys lie."""

    width: int = 80
    """Centimetres."""
    depth: int = 30
    """Centimetres."""
    label: str | None = None
    """What is written on it."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width is {self.width}; it has to be 1 or more")
        if self.depth > self.width:
            raise ValueError(f"a depth of {self.depth} does not go with a width of {self.width}")


@config_class
class Nursery:
    """A whole config."""

    name: str
    """Whose it is."""
    best: Toy
    """The toy that is always there."""
    others: tuple[Toy, ...] = ()
    """More toys."""
    shelf: Shelf = Shelf()
    """Where they lie."""
    dust: float = 0.0
    """Grams."""
    tidy: bool = True
    """Whether it is."""
