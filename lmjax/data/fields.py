"""Where a row's text is: a column, a path into nested values, or a template of several."""

import functools
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Template(NamedTuple):
    """Texts and fields in turn: literal 0, field 0, literal 1, field 1, …, and a last literal."""

    literals: tuple[str, ...]
    fields: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields, each once."""
        return tuple(dict.fromkeys(self.fields))


class NoText(Exception):
    """A row has no text where it should be; the message says why."""


@functools.cache
def parse_template(text_field: str) -> Template:
    """A field alone, or a template such as "{title}: {body.0.text}", in which {{ and }} are braces.

    Raises ValueError for a template without a field or with anything but a field in its braces.
    """
    if "{" not in text_field and "}" not in text_field:
        return Template(("", ""), (text_field,))
    literals, fields = [""], []
    try:
        parsed = list(string.Formatter().parse(text_field))
    except ValueError as error:
        raise ValueError(f"text_field is {text_field!r}: {error}; a brace of the text is written twice") from None
    for literal, field, options, conversion in parsed:
        literals[-1] += literal
        if field is None:
            continue
        if not field or options or conversion:
            raise ValueError(f"text_field is {text_field!r}: a field is written as {{name}}, or {{name.inner}}")
        fields.append(field)
        literals.append("")
    if not fields:
        raise ValueError(f"text_field is {text_field!r}, which names no field, as {{title}} would")
    return Template(tuple(literals), tuple(fields))


def text_of(row: Any, template: Template) -> str:
    """The text of a row: of a mapping, whose values may be mappings and lists. Raises NoText."""
    values = [_find(row, field) for field in template.fields]
    if len(values) == 1 and template.literals == ("", ""):
        return values[0]
    parts = [template.literals[0]]
    for value, literal in zip(values, template.literals[1:], strict=True):
        parts += [value, literal]
    return "".join(parts)


def first_key(field: str, keys: Sequence[str] | Mapping[str, Any]) -> str | None:
    """The key of a row that a field begins with: the field itself, or what stands before its first dot."""
    return next((key for key in (field, field.split(".")[0]) if key in keys), None)


def _find(row: Any, field: str) -> str:
    key = first_key(field, row) if isinstance(row, Mapping) else None
    if key is None:
        raise NoText(f"no object with the key {field!r}")
    value = row[key]
    for part in field[len(key) + 1 :].split(".") if key != field else ():
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise NoText(f"nothing under {field!r}")
    if not isinstance(value, str):
        raise NoText(f"the value of {field!r} is not text")
    return value
