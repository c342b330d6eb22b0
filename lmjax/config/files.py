"""From YAML and gin files and ``key=value`` overrides to one plain tree, and which of them set what.

A file may name others to start from, ``base: file.yaml`` or a list of them, by paths that are relative to itself. Later
ones win, the file itself wins over its bases, and overrides win over files. A gin file's ``include 'file.gin'`` is the
same, but for its place among the lines: what stands below it wins over it. Mappings are merged key by key, but for two
cases: a mapping with another ``kind`` than the one it is merged over is another class and replaces it whole, and an
override replaces what it names.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from etils import epath
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lmjax.config import gin
from lmjax.errors import InputError
from lmjax.paths import as_path, reaching

Path = tuple[str | int, ...]


class Layer(NamedTuple):
    """One place that sets values."""

    name: str
    """The file, or ``override key=value``."""
    tree: Any
    """The values, without ``base``; those of an override lie at its key."""
    at: Path = ()
    """Where ``tree`` goes."""
    lines: Mapping[Path, int] = {}
    """Of a gin file: where each key is bound."""

    def place(self, path: Path) -> str:
        """The name, with the line that binds ``path`` or what holds it, where that is known."""
        held = (path[:length] for length in range(len(path), 0, -1))
        line = next((self.lines[key] for key in held if key in self.lines), None)
        return self.name if line is None else f"{self.name}:{line}"


class Composed(NamedTuple):
    """The whole tree with interpolations resolved, and the layers that it came from, strongest last."""

    tree: dict[str, Any]
    layers: list[Layer]

    def origin(self, path: Path) -> str:
        """The strongest layer that sets ``path`` or, for a key that nobody sets, what should hold it as a whole."""
        for length in range(len(path), -1, -1):
            for layer in reversed(self.layers):
                whole = length == len(path) or len(layer.at) <= length
                if whole and _has(layer, path[:length]):
                    return layer.place(path[:length])
        raise AssertionError("the file itself is a layer, and holds everything")


def compose(file: str | None, overrides: Sequence[str] = (), keys: Collection[str] = ()) -> Composed:
    """Read ``file`` with its bases, or nothing, and apply ``overrides``. Raises InputError for all that is not about
    types.

    ``keys`` are those at the top of a config, which a gin file binds as it does macros.
    """
    layers = [Layer("the defaults", {})]
    if file is not None:
        path = as_path(file)
        with reaching(path):
            layers = _without_macros(str(path), list(_read(path, (), "")), keys)
    tree: dict[str, Any] = {}
    for layer in layers:
        tree = _merge(tree, layer.tree)
    whole = OmegaConf.create(tree)
    for override in overrides:
        layer = _parse(override)
        try:
            OmegaConf.update(whole, override.partition("=")[0].strip(), layer.tree, merge=False)
        except (OmegaConfBaseException, ValueError):
            key = ".".join(map(str, layer.at))
            raise InputError(
                f"{layer.name}: {key} leads nowhere: the entries of a list are named by their positions, from 0 on. "
                "Replace the whole list to make it longer"
            ) from None
        layers.append(layer)
    try:
        plain = OmegaConf.to_container(whole, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        path = tuple(str(error.full_key or "").replace("[", ".").replace("]", "").split("."))
        name = Composed(tree, layers).origin(path)
        raise InputError(f"{name}: {error.full_key}: {_first_line(error)}") from None
    assert isinstance(plain, dict)
    return Composed({str(key): value for key, value in plain.items()}, layers)


def _read(file: epath.Path, above: tuple[str, ...], place: str) -> Iterator[Layer | list[gin.Binding]]:
    """The layers of ``file``, weakest first. ``above`` are the files that led here, by what stands at ``place``."""
    name = str(file)
    if name in above:
        chain = " -> ".join([*above[above.index(name) :], name])
        raise InputError(f"{name}: base files form a circle: {chain}. Remove one `base:` or `include` of them")
    if not file.exists():
        why = f"{place}: there is no file {name}" if above else f"there is no config file {name}"
        raise InputError(f"{why}. It is found relative to the file that names it" if above else why)
    if file.is_dir():
        raise InputError(f"{name} is a directory; give the YAML file of an experiment")
    if name.endswith(".gin"):
        own: list[gin.Binding] = []
        for statement in gin.parse(name, _text(name, file.read_bytes())):
            if isinstance(statement, gin.Include):
                yield own
                own = []
                yield from _read(_beside(file, statement.file), (*above, name), f"{statement.place}: include")
            else:
                own.append(statement)
        yield own
        return
    tree = _parse_yaml(name, file.read_bytes())
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise InputError(f"{name}: base: found {bases!r}, allowed: the path of a YAML file or a list of such paths")
    for base in bases:
        yield from _read(_beside(file, base), (*above, name), f"{name}: base")
    yield Layer(name, tree)


def _without_macros(file: str, read: Sequence[Layer | list[gin.Binding]], keys: Collection[str]) -> list[Layer]:
    """Gin's bindings as layers, once all files are read: the last definition of a macro counts wherever it is used."""
    bindings = [binding for part in read if isinstance(part, list) for binding in part]
    gin.check_names([binding for binding in bindings if binding.file == file], bindings, keys)
    layers = []
    for part in read:
        if isinstance(part, Layer):
            layers.append(part)
        elif found := gin.values(part, bindings, keys):
            lines: dict[Path, int] = {tuple(binding.key.split(".")): binding.line for binding in found}
            layers.append(Layer(found[0].file, gin.tree(found), lines=lines))
    return layers


def _beside(file: epath.Path, base: str) -> epath.Path:
    """``base`` as seen from ``file``, in one spelling, so that a circle is noticed."""
    path = file.parent / base
    return path if "://" in str(path) else epath.Path(os.path.normpath(path))


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text (byte {error.start}); a config is a YAML or gin file") from None


def _parse_yaml(name: str, content: bytes) -> dict[str, Any]:
    text = _text(name, content)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise InputError(f"{name}: found {text.strip()[:40]!r}, allowed: a mapping of sections, as `model:`")
        tree = OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{name}: {_yaml_problem(error)}") from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _parse(override: str) -> Layer:
    key, equals, value = override.partition("=")
    key = key.strip()
    parts = key.replace("[", ".").replace("]", "").split(".")
    if not equals or not all(parts):
        raise InputError(f"override {override}: not of the form key=value; write for example train.steps=100")
    name = f"override {override}"
    if not value.strip():
        raise InputError(f"{name}: no value; write {key}=null or {key}='\"\"' if that is meant")
    # As a value in a file would be read, so that 3e-4 is a number on the command line too.
    wrapped = _parse_yaml(name, b"value: " + value.encode())
    if set(wrapped) != {"value"}:
        raise InputError(f"{name}: the value is not one YAML value; quote it")
    return Layer(name, wrapped["value"], tuple(int(part) if part.isdigit() else part for part in parts))


def _merge(below: Any, above: Any) -> Any:
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if "kind" in above and "kind" in below and above["kind"] != below["kind"]:
        return above
    return below | {key: _merge(below[key], value) if key in below else value for key, value in above.items()}


def _has(layer: Layer, path: Path) -> bool:
    """Whether ``layer`` sets ``path``, or lies within it."""
    shared = min(len(layer.at), len(path))
    if tuple(map(str, layer.at[:shared])) != tuple(map(str, path[:shared])):
        return False
    tree = layer.tree
    for part in path[shared:]:
        if isinstance(tree, dict) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and str(part).isdigit() and int(part) < len(tree):
            tree = tree[int(part)]
        else:
            return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _yaml_problem(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or _first_line(error)
    return f"line {mark.line + 1}: {problem}" if mark else problem
