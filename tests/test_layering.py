"""Imports point one way, flax and jax stay where they belong, and no file grows long: DESIGN's layout, as a test."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 400
MAX_FAMILY_LINES = 100
"""Of a family of Hugging Face models: what it takes to add one."""

LAYERS = [
    {"compat"},
    {"hardware"},
    {"xla_flags"},
    {"mesh", "precision", "startup"},
    {"sharding"},
    {"ops"},
    {"nn"},
    {"models", "data", "optim", "checkpoint"},
    {"generate", "convert"},
    {"train"},
    {"config"},
    {"plan"},
    {"cli"},
]
"""From the bottom up; parts of one layer do not import each other."""

FOR_ALL = {"errors", "schema", "paths"}
"""What everything may import, and what imports nothing but each other."""

HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
FLAX_HOMES = ("compat.py", "nn/", "models/", "train/state.py")
NEVER = {"torch", "transformers"}


def imports(file: Path, package: Path) -> list[tuple[int, str]]:
    """The modules that ``file`` imports anywhere in it, with their lines, as full dotted names.

    ``from a import b`` is a.b where that is a module of the package, else a. Relative and computed imports are found as
    names that begin with ``.`` and ``?``.
    """
    found = []
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.append((node.lineno, "." * node.level + (node.module or "")))
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            for alias in node.names:
                inner = package.parent.joinpath(*node.module.split("."), alias.name)
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                of_package = node.module == package.name and not alias.name.startswith("__")
                found.append((node.lineno, f"{node.module}.{alias.name}" if is_module or of_package else node.module))
        elif isinstance(node, ast.Call) and _called(node.func) in ("import_module", "__import__"):
            found.append((node.lineno, "?"))
    return found


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def problems(package: Path) -> list[str]:
    """Every breach of the layering in ``package``, each with its file and line."""
    found = []
    graph: dict[str, set[str]] = {}
    for file in sorted(package.rglob("*.py")):
        inside = file.relative_to(package)
        part = inside.parts[0].removesuffix(".py")
        if part != "__init__" and part not in HEIGHT.keys() | FOR_ALL:
            found.append(f"{inside}: {part} has no place in the layering")
            continue
        module = ".".join([package.name, *inside.with_suffix("").parts]).removesuffix(".__init__")
        graph[module] = set()
        for line, name in imports(file, package):
            breach = _breach(package.name, inside, part, name)
            if breach:
                found.append(f"{inside}:{line}: {breach}")
            if name.split(".")[0] == package.name:
                graph[module].add(name)
    return found + [f"imports form a circle: {' -> '.join(circle)}" for circle in circles(graph)]


def _breach(package: str, file: Path, part: str, name: str) -> str | None:
    if name == "?":
        return "a computed import hides an arrow"
    if name.startswith("."):
        return f"relative import {name}"
    outside, *rest = name.split(".")
    if outside in NEVER:
        return f"{outside} is for tests and benchmarks"
    if outside == "flax" and not str(file).startswith(FLAX_HOMES):
        return "flax is imported in compat.py, nn/, models/ and train/state.py only"
    if outside in ("jax", "jaxlib") and part in ("data", "__init__", *FOR_ALL):
        return f"{part} does not import jax"
    if outside != package or not rest:
        return None
    target = rest[0]
    if part == "__init__":
        return f"the package itself imports {target}"
    if target == part or target in FOR_ALL:
        return None
    if part in FOR_ALL or part == "data":
        return f"{part} imports {target}, and may import {' and '.join(sorted(FOR_ALL))} only"
    if target not in HEIGHT:
        return f"{target} has no place in the layering"
    if HEIGHT[target] >= HEIGHT[part]:
        return f"{part} imports {target}, which is not below it"
    return None


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One circle of each strongly connected group of ``graph``, from its first module in the alphabet back to it."""
    found = []
    seen: set[str] = set()
    for start in sorted(graph):
        if start in seen:
            continue
        # Breadth first, so that the circle that is shown is a shortest one.
        before: dict[str, str | None] = {start: None}
        queue = [start]
        for module in queue:
            for after in sorted(graph.get(module, ())):
                if after == start:
                    path = [start]
                    step: str | None = module
                    while step is not None:
                        path.append(step)
                        step = before[step]
                    found.append(path[::-1])
                    seen.update(path)
                    queue.clear()
                    break
                if after not in before:
                    before[after] = module
                    queue.append(after)
    return found


def make_package(root: Path, files: dict[str, str]) -> Path:
    """A made-up package; ``train/state`` is train/state.py."""
    package = root / "lmjax"
    for name, source in files.items():
        file = package / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return package


@pytest.mark.fast
def test_imports_point_one_way():
    assert problems(ROOT / "lmjax") == []


@pytest.mark.fast
def test_no_source_file_is_long():
    folders = [ROOT / folder for folder in ("lmjax", "tests", "benchmarks", ".ci")]
    lines = {str(file): len(file.read_text().splitlines()) for folder in folders for file in folder.rglob("*.py")}
    assert {file: length for file, length in lines.items() if length > MAX_LINES} == {}
    families = {file: length for file, length in lines.items() if "/lmjax/convert/families/" in file}
    assert len(families) > 18
    assert max(families.values()) <= MAX_FAMILY_LINES
    assert str(ROOT / "lmjax" / "errors.py") in lines


@pytest.mark.fast
def test_a_sound_package_has_no_problems(tmp_path):
    package = make_package(
        tmp_path,
        {
            "compat": "from flax import nnx\nimport jax",
            "errors": "",
            "mesh": "from lmjax.compat import x\nfrom lmjax.errors import y",
            "data/batches": "import numpy\nfrom lmjax.data import pack\nfrom lmjax.data.pack import z",
            "data/pack": "",
            "train/state": "from flax import nnx\nfrom lmjax.models.decoder import d",
            "models/decoder": "def f():\n    import lmjax.nn.norm",
            "nn/norm": "import jax",
            "cli/train": "from lmjax import config\nfrom lmjax.train.state import s",
            "config/run": "",
        },
    )
    assert problems(package) == []


@pytest.mark.fast
@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"nn/norm": "from lmjax.models.decoder import d"}, "nn imports models"),
        ({"nn/norm": "def f():\n    import lmjax.models.decoder"}, "nn imports models"),
        ({"nn/norm": "from lmjax import models"}, "nn imports models"),
        ({"models/decoder": "from lmjax.checkpoint.save import s"}, "models imports checkpoint"),
        ({"data/pack": "from lmjax.mesh import m"}, "data imports mesh"),
        ({"data/pack": "import jax.numpy as jnp"}, "data does not import jax"),
        ({"errors": "from lmjax.mesh import m"}, "errors imports mesh"),
        ({"__init__": "from lmjax.mesh import m"}, "the package itself imports mesh"),
        ({"__init__": "import jax"}, "does not import jax"),
        ({"train/loop": "from flax import nnx"}, "flax is imported in"),
        ({"ops/attention": "import flax.linen"}, "flax is imported in"),
        ({"nn/norm": "from ..models import decoder"}, "relative import ..models"),
        ({"nn/norm": "from . import param"}, "relative import ."),
        ({"cli/main": "import importlib\nimportlib.import_module('lmjax.x')"}, "computed import"),
        ({"cli/main": "__import__('lmjax.x')"}, "computed import"),
        ({"nn/norm": "import torch"}, "torch is for tests"),
        ({"utils": ""}, "utils has no place"),
        ({"helpers/text": ""}, "helpers has no place"),
        (
            {"nn/a": "from lmjax.nn import b", "nn/b": "from lmjax.nn import a"},
            "lmjax.nn.a -> lmjax.nn.b -> lmjax.nn.a",
        ),
        ({"nn/a": "import lmjax.nn.b", "nn/b": "import lmjax.nn.c", "nn/c": "from lmjax.nn.a import x"}, "circle"),
    ],
)
def test_a_breach_is_found(tmp_path, files, problem):
    found = problems(make_package(tmp_path, files))
    assert any(problem in line for line in found), found
