"""Experiments written as gin: bindings of the same keys that a YAML experiment has, macros and includes.

Read by gin-config's own parser and by nothing else of gin: there are no configurables, no references (``@``), no
imports and no scopes, and nothing is bound globally. ``model.num_layers = 12`` sets a key; a name without a dot is a
key of the config where the config has one of that name, as ``run_dir``, and a macro otherwise; ``%name`` is its value,
that of the last definition wherever it is used. ``include`` names a gin or a YAML file, relative to the file that
names it.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from lmjax.errors import InputError


class Macro(NamedTuple):
    """``%name`` where a value may stand."""

    name: str


class Reference(NamedTuple):
    """``@name``, which has no place in a config."""

    name: str


class Include(NamedTuple):
    """What another file sets, as if its lines stood here."""

    file: str
    place: str


class Binding(NamedTuple):
    """One key, or one macro, and its value, in which macros are not replaced yet."""

    key: str
    value: Any
    file: str
    line: int

    @property
    def is_bare(self) -> bool:
        """Without a dot, so that it may be a macro."""
        return "." not in self.key

    @property
    def place(self) -> str:
        """The file and line, as messages open with them."""
        return f"{self.file}:{self.line}"


Statement = Binding | Include


def parse(file: str, text: str) -> list[Statement]:
    """The statements of a gin file, in order. Raises InputError with file and line for what is not one."""
    import tokenize

    from gin import config_parser

    class Delegate(config_parser.ParserDelegate):
        def macro(self, macro_name: str) -> Macro:
            return Macro(macro_name)

        def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
            return Reference(scoped_configurable_name)

    found: list[Statement] = []
    parser = None
    try:
        parser = config_parser.ConfigParser(text, Delegate())
        while (statement := parser.parse_statement()) is not None:
            line = statement.location.line_num
            match statement:
                case config_parser.IncludeStatement():
                    found.append(Include(statement.filename, f"{file}:{line}"))
                case config_parser.ImportStatement():
                    raise InputError(f"{file}:{line}: {statement.format()}: nothing can be imported; remove the line")
                case config_parser.BindingStatement():
                    found.append(_binding(file, statement))
    except (SyntaxError, tokenize.TokenError, TypeError, ValueError) as error:
        line = getattr(parser and parser.current_token, "start", (1, 0))[0]
        raise InputError(_syntax(file, line, error)) from None
    return found


def _binding(file: str, statement: Any) -> Binding:
    line = statement.location.line_num
    key = ".".join(part for part in (statement.selector, statement.arg_name) if part)
    if statement.scope:
        raise InputError(
            f"{file}:{line}: {statement.scope}/{key}: there are no scopes here; write a key, as model.num_layers"
        )
    _check_value(f"{file}:{line}: {key}", statement.value)
    return Binding(key, statement.value, file, line)


def _check_value(where: str, value: Any) -> None:
    """Raises InputError for Python literals that a config has no place for."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise InputError(f"{where}: found the key {key!r}; the keys of a mapping are text, as 'kind'")
            _check_value(where, inner)
    elif isinstance(value, Reference):
        raise InputError(f"{where}: found @{value.name}; there are no references here, only values and %macros")
    elif isinstance(value, Macro):
        return
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_value(where, inner)
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise InputError(f"{where}: found {value!r}; a config has text, numbers, True, False, None, lists and mappings")


def _syntax(file: str, line: int, error: Exception) -> str:
    """What the parser found, on one line, with its place."""
    place = getattr(error, "lineno", None)
    if (
        place is None and len(error.args) == 2 and isinstance(error.args[1], tuple)
    ):  # of tokenize: message, (line, column)
        place = error.args[1][0]
    message = getattr(error, "msg", None) or str(error.args[0] if error.args else error)
    first = str(message).strip().partition("\n")[0].rstrip(".")
    return f"{file}:{place or line}: {first}. A line is `key = value`, as model.num_layers = 12"


def check_names(own: Sequence[Binding], bindings: Sequence[Binding], keys: Collection[str]) -> None:
    """Raise InputError for a name without a dot in ``own`` that is no key and no macro that ``bindings`` use.

    ``own`` are those of the experiment's file: one that it includes may offer macros that it has no use for.
    """
    used = {name for binding in bindings for name in _macros(binding.value)}
    for binding in own:
        name = binding.key
        if binding.is_bare and name not in keys and name not in used:
            raise InputError(
                f"{binding.place}: {name} is no key of the config, which has {', '.join(keys)}, and no macro that "
                f"a %{name} uses"
            )


def values(bindings: Sequence[Binding], macros: Sequence[Binding], keys: Collection[str]) -> list[Binding]:
    """``bindings`` without the macros' own, and with the values of ``macros`` put in."""
    defined = {binding.key: binding for binding in macros if binding.is_bare}
    return [
        binding._replace(value=_replaced(binding.value, binding, defined, ()))
        for binding in bindings
        if not binding.is_bare or binding.key in keys
    ]


def _replaced(value: Any, binding: Binding, defined: dict[str, Binding], above: tuple[str, ...]) -> Any:
    match value:
        case Macro(name):
            if name not in defined:
                raise InputError(f"{binding.place}: no line defines the macro %{name}; write {name} = value")
            if name in above:
                circle = " -> ".join(f"%{macro}" for macro in (*above, name))
                raise InputError(f"{binding.place}: macros form a circle: {circle}")
            return _replaced(defined[name].value, defined[name], defined, (*above, name))
        case dict():
            return {key: _replaced(inner, binding, defined, above) for key, inner in value.items()}
        case list() | tuple():
            return [_replaced(inner, binding, defined, above) for inner in value]
    return value


def _macros(value: Any) -> set[str]:
    match value:
        case Macro(name):
            return {name}
        case dict():
            return set().union(*map(_macros, value.values()))
        case list() | tuple():
            return set().union(*map(_macros, value))
    return set()


def tree(bindings: Sequence[Binding]) -> dict[str, Any]:
    """The values as one mapping of mappings. Raises InputError for a key that is bound twice or has no place."""
    whole: dict[str, Any] = {}
    for binding in bindings:
        holder: Any = whole
        *sections, last = binding.key.split(".")
        for depth, section in enumerate(sections):
            holder = holder.setdefault(section, {})
            if not isinstance(holder, dict):
                above = ".".join(sections[: depth + 1])
                raise InputError(f"{binding.place}: {binding.key} has no place: {above} is {holder!r}")
        if last in holder:
            raise InputError(f"{binding.place}: {binding.key} is bound a second time in this file")
        holder[last] = binding.value
    return whole
