"""Read a config file as a class, and write an object as a file that reads back to it."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import pydantic
import yaml
from etils import epath

from lmjax.config.explain import explain
from lmjax.config.files import compose
from lmjax.errors import InputError

T = TypeVar("T")


def load_as(cls: type[T], file: str | None, overrides: Sequence[str] = ()) -> T:
    """The YAML or gin ``file`` (or none), with its bases and ``overrides`` (``key=value``), as an object of a config
    class.

    Raises InputError with one line for each thing that is wrong: who set it, the full key, what was found, what is
    allowed, and the nearest known key.
    """
    composed = compose(file, overrides, [field.name for field in dataclasses.fields(cls)])  # pyright: ignore
    # From JSON, since pydantic's strict mode takes no dict for a dataclass but does take a JSON object for one.
    content = json.dumps(composed.tree, default=_unreadable)
    try:
        return pydantic.TypeAdapter(cls).validate_json(content)
    except pydantic.ValidationError as error:
        raise InputError(explain(cls, composed, error.errors())) from None


def to_tree(config: Any) -> dict[str, Any]:
    """Every value of ``config``, defaults included, as the mappings, lists, text and numbers that JSON has."""
    return pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")


def to_yaml(config: Any) -> str:
    """:func:`to_tree` of ``config`` as YAML that :func:`load_as` reads back to an equal object."""
    return to_yaml_text(_escaped(to_tree(config)), width=120, allow_unicode=False)


def to_yaml_text(tree: Any, **options: Any) -> str:
    """Plain data as YAML whose text is text to every reader of YAML 1.1 or 1.2."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, **options)


class _Dumper(yaml.SafeDumper):
    """Quotes what PyYAML takes for text and others do not: numbers such as 1e3, and words such as y."""


_NOT_TEXT = re.compile(r"[-+.]?[0-9].*|[-+]?\.(inf|nan)|y|n|yes|no|on|off|true|false|null|~", re.IGNORECASE)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "'" if _NOT_TEXT.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def dump(config: Any, file: str) -> None:
    """Write :func:`to_yaml` of ``config``: the file is there whole, or as it was before."""
    path = epath.Path(file)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(to_yaml(config))
    unfinished.replace(path)


def _escaped(value: Any) -> Any:
    """``value`` with the text that would be read as an interpolation made plain text."""
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    # A backslash before an interpolation is an escape, so those that stand there are doubled.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _unreadable(value: Any) -> Any:
    raise InputError(f"found {value!r}, of type {type(value).__name__}; a config has text, numbers, lists and mappings")
