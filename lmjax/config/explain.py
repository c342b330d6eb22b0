"""What is wrong with a config, in words: the key, who set it, what was found, what is allowed, what may be meant."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import pydantic_core

from lmjax.config.files import Composed, Path

WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}


class Place(NamedTuple):
    """Where pydantic's location of an error lies in the config as its author sees it."""

    path: Path
    """Keys and positions, without the names that pydantic adds for the members of a union."""
    declared: Any
    """The type that is declared there."""
    owner: Any
    """The class of the mapping that holds the last key, or None."""


def explain(cls: type, composed: Composed, errors: Sequence[pydantic_core.ErrorDetails]) -> str:
    """All of ``errors``, found in ``composed`` read as ``cls``, one a line."""
    lines: list[str] = []
    for error in errors:
        place = locate(cls, _location(cls, error))
        line = f"{composed.origin(place.path)}: {_problem(cls, composed, error, place)}"
        if line not in lines:  # each member of a union reports the same value
            lines.append(line)
    return "\n".join(lines)


def locate(cls: type, loc: Sequence[str | int]) -> Place:
    """Follow pydantic's ``loc`` down from ``cls``."""
    path: list[str | int] = []
    declared: Any = cls
    owner: Any = None
    members = _members(cls)
    for part in loc:
        named = [member for member in members if part in _names(member)] if len(members) > 1 else []
        if named:
            members = named
            continue
        path.append(part)
        owner = next((member for member in members if dataclasses.is_dataclass(member)), None)
        declared = _inside(members, part)
        members = _members(declared)
    return Place(tuple(path), declared, owner)


def _location(cls: type, error: pydantic_core.ErrorDetails) -> Path:
    """Where ``error`` is: that of a whole section whose message opens with one of its keys is at that key."""
    loc = error["loc"]
    place = locate(cls, loc)
    first = error["msg"].removeprefix("Value error, ").split()[0].rpartition(".")[2].partition("=")[0]
    sections = [member for member in _members(place.declared) if dataclasses.is_dataclass(member)]
    if error["type"] == "value_error" and any(first in _keys(section) for section in sections):
        return (*loc, first)
    return loc


def describe(declared: Any) -> str:
    """The values that a declared type allows."""
    members = _members(declared)
    if len(members) > 1:
        if all(dataclasses.is_dataclass(member) for member in members):
            return f"a mapping with a kind: {_join(_tags(members))}"
        return " or ".join(describe(member) for member in members)
    (member,) = members
    if typing.get_origin(member) is Literal:
        return _join([_show(value) for value in typing.get_args(member)])
    if dataclasses.is_dataclass(member):
        return f"a mapping with the keys {_join(_keys(member), 'and')}"
    if typing.get_origin(member) in (tuple, list):
        return f"a list, each entry {describe(typing.get_args(member)[0])}"
    if typing.get_origin(member) is dict:
        return f"a mapping, each value {describe(typing.get_args(member)[1])}"
    return WORDS.get(member, str(member))


def _problem(cls: type, composed: Composed, error: pydantic_core.ErrorDetails, place: Place) -> str:
    key = ".".join(map(str, place.path))
    match error["type"]:
        case "unexpected_keyword_argument":
            return _unknown(cls, composed, place)
        case "missing":
            return f"{key} is missing, allowed: {describe(place.declared)}"
        case "union_tag_not_found":
            return f"{key}.kind is missing, allowed: {_join(_tags(_members(place.declared)))}"
        case "union_tag_invalid":
            tags = _tags(_members(place.declared))
            found = error["ctx"]["tag"] if "ctx" in error else error["input"]
            return f"{key}.kind: found {_show(found)}, allowed: {_join(tags)}{_meant(found, tags)}"
        case "value_error":
            message = error["msg"].removeprefix("Value error, ")
            if place.path and message.startswith((key, str(place.path[-1]))):
                return key + message.removeprefix(key).removeprefix(str(place.path[-1]))
            return f"{key}: {message}" if key else message
    found = _show(error["input"])
    if error["type"].endswith("_type") or error["type"] == "literal_error":
        choices = [str(choice) for member in _members(place.declared) for choice in _choices(member)]
        return (
            f"{key or 'the file'}: found {found}, allowed: {describe(place.declared)}{_meant(error['input'], choices)}"
        )
    message = error["msg"].removeprefix("Input should be ")
    return f"{key}: found {found}, allowed: {message}"


def _unknown(cls: type, composed: Composed, place: Place) -> str:
    *holder, name = place.path
    section = ".".join(map(str, holder))
    keys = _keys(place.owner)
    # The same key of another section is meant more often than a similar one of this section.
    same = [".".join(path) for path in _all_keys(cls) if path[-1] == name and path != place.path]
    similar = [f"{section}.{key}" if section else key for key in difflib.get_close_matches(str(name), keys, n=1)]
    meant = f"; did you mean {[*same, *similar][0]}?" if same or similar else ";"
    kinds = _tags([place.owner]) if "kind" in keys else []
    whole = f"{section or 'a config'}{f' of kind {kinds[0]}' if kinds else ''}"
    text = f"{'.'.join(map(str, place.path))}: unknown key{meant} {whole} has {_join(keys, 'and')}"
    for layer in composed.layers:
        if layer.at == (*holder, "kind"):
            give = f"{section}={{kind: {layer.tree}}}"
            text += f". {layer.name} changes the kind alone: give the section whole, as '{give}'"
    return text


def _members(declared: Any) -> list[Any]:
    """The types that a union names, or the one that ``declared`` is, without annotations and aliases."""
    origin = typing.get_origin(declared)
    if origin is typing.Annotated:
        return _members(typing.get_args(declared)[0])
    if origin in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(declared) for member in _members(part)]
    return [declared]


def _names(member: Any) -> set[Any]:
    """What pydantic calls a member of a union in a location."""
    if dataclasses.is_dataclass(member):
        kind = typing.get_type_hints(member).get("kind")
        return {member.__name__, *typing.get_args(kind)}  # pyright: ignore[reportAttributeAccessIssue]
    return {getattr(member, "__name__", None)} - {None}


def _inside(members: list[Any], part: str | int) -> Any:
    """The type declared for ``part`` of a value of one of ``members``; None where there is none."""
    for member in members:
        origin, arguments = typing.get_origin(member), typing.get_args(member)
        if dataclasses.is_dataclass(member) and part in _keys(member):
            return typing.get_type_hints(member, include_extras=True)[str(part)]
        if origin in (list, tuple) and isinstance(part, int):
            return arguments[0] if origin is list or arguments[-1] is Ellipsis else arguments[part]
        if origin is dict:
            return arguments[1]
    return None


def _keys(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _all_keys(declared: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key of every section, from the top down."""
    sections = [member for member in _members(declared) if dataclasses.is_dataclass(member)]
    for section in sections:
        hints = typing.get_type_hints(section, include_extras=True)
        for key in _keys(section):
            yield (*above, key)
            yield from _all_keys(hints[key], (*above, key))


def _tags(members: Sequence[Any]) -> list[str]:
    classes = [member for member in members if dataclasses.is_dataclass(member)]
    return [str(tag) for member in classes for tag in typing.get_args(typing.get_type_hints(member)["kind"])]


def _choices(member: Any) -> tuple[Any, ...]:
    return typing.get_args(member) if typing.get_origin(member) is Literal else ()


def _meant(found: Any, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(found), choices, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _join(words: Sequence[str], last: str = "or") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def _show(value: Any) -> str:
    """A value as YAML has it, shortened."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
