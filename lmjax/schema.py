"""How a component declares its config: a frozen dataclass whose fields are checked when it is built."""

import functools
import os.path
import typing

import pydantic
from pydantic import dataclasses

from lmjax.errors import InputError

T = typing.TypeVar("T")

UserPath = typing.Annotated[str, pydantic.AfterValidator(os.path.expanduser)]
"""A path as people write it: ~ is their home directory, which no shell puts into a YAML file or after key=."""


@typing.dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(pydantic.Field,))
def config_class(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen, keyword-only dataclass that knows its keys and checks their types.

    Types are strict: ``"3"`` is not an int and ``True`` is not a number. A ``__post_init__`` that finds two fields in
    conflict raises ``ValueError``. Built in Python, a bad value is an :class:`InputError`; read from a file, it is
    pydantic's error, to which ``lmjax.config`` adds the file and the full key.
    """
    settings = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    checked: typing.Any = dataclasses.dataclass(config=settings, frozen=True, kw_only=True)(cls)
    build = checked.__init__

    @functools.wraps(build)
    def __init__(self: typing.Any, *args: typing.Any, **fields: typing.Any) -> None:
        try:
            build(self, *args, **fields)
        except pydantic.ValidationError as error:
            raise InputError("; ".join(_line(cls.__name__, found) for found in error.errors())) from None

    checked.__init__ = __init__
    return checked


def _line(name: str, found: typing.Any) -> str:
    where = ".".join([name, *(str(part) for part in found["loc"])])
    message = found["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if found["type"] == "value_error" else f"{where}: {message}, found {found['input']!r}"
