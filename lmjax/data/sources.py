"""From sources to parts: shares of the corpus that can be read on their own, in an order that never changes."""

import dataclasses
import glob
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lmjax.data.config import DataConfig, FilesSource, JsonlSource, Source, StdlibSource
from lmjax.errors import InputError

PART_BYTES = 2**23
"""Text of a part, about: small enough that many processes finish together, large enough to be worth a file."""

PROSE_EXTENSIONS = (".txt", ".md")
STDLIB_EXTENSIONS = (".py", ".txt", ".rst", ".md")
STDLIB_LEFT_OUT = frozenset({"site-packages", "test", "tests", "idle_test"})
"""Directories that are not there in every installation of the same Python."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A share of one source."""

    source: Source
    files: tuple[str, ...]
    start: int = 0
    """jsonl: the first byte; the part has the lines that begin from here on …"""
    stop: int = 0
    """jsonl: … and before here."""

    @property
    def repairable(self) -> bool:
        """Whether its text may hold mis-decoded characters."""
        return not isinstance(self.source, StdlibSource) and self.source.content == "prose"


@dataclasses.dataclass
class Reading:
    """What was met while a part was read."""

    skipped: list[str] = dataclasses.field(default_factory=list)
    """Files and lines that are not text, with the reason."""


def find_parts(config: DataConfig) -> list[Part]:
    """The whole corpus, source by source, files in the order of their names. Raises InputError for one that is empty."""
    parts: list[Part] = []
    for number, source in enumerate(config.sources):
        where = f"data.sources.{number}"
        files = _files(source, where)
        if isinstance(source, JsonlSource):
            parts += [part for file in files for part in _jsonl_parts(source, file)]
        else:
            parts += _file_parts(source, files)
    return parts


def listing(config: DataConfig) -> list[tuple[str, int]]:
    """Every file of the corpus and its size: what tells a changed corpus from the one that was prepared."""
    found = [file for number, source in enumerate(config.sources) for file in _files(source, f"data.sources.{number}")]
    return [(file, Path(file).stat().st_size) for file in found]


def read_part(part: Part, reading: Reading) -> Iterator[str]:
    """The documents of a part, as they are in their files."""
    if isinstance(part.source, JsonlSource):
        yield from _read_jsonl(part, part.source.text_field, reading)
        return
    for file in part.files:
        try:
            yield Path(file).read_bytes().decode()
        except UnicodeDecodeError as error:
            reading.skipped.append(f"{file}: not UTF-8 at byte {error.start}")


def _files(source: Source, where: str) -> list[str]:
    match source:
        case StdlibSource():
            root = Path(sysconfig.get_path("stdlib"))
            found = [path for path in _walk(root, STDLIB_EXTENSIONS) if STDLIB_LEFT_OUT.isdisjoint(path.parts)]
        case FilesSource():
            found = _matching(source, where)
        case JsonlSource():
            path = Path(source.path).expanduser()
            found = [path] if path.is_file() else _glob(source.path)
    if not found:
        raise InputError(f"{where}: {_named(source)} has no file to read. Name a file, a directory or a glob that has some.")
    return [str(path) for path in found]


def _matching(source: FilesSource, where: str) -> list[Path]:
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _walk(path, source.extensions or PROSE_EXTENSIONS)
    if source.extensions is not None:
        raise InputError(
            f"{where}.extensions: has an effect with a directory only, and {source.path} is not one. Leave it out, or put "
            "the ending into the glob."
        )
    return [path] if path.is_file() else _glob(source.path)


def _walk(root: Path, extensions: tuple[str, ...]) -> list[Path]:
    found = (path for path in root.rglob("*") if path.suffix in extensions and path.is_file())
    return sorted(path for path in found if "__pycache__" not in path.parts)


def _glob(pattern: str) -> list[Path]:
    pattern = str(Path(pattern).expanduser())
    return sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())


def _named(source: Source) -> str:
    return source.kind if isinstance(source, StdlibSource) else f"{source.kind} {source.path}"


def _file_parts(source: Source, files: list[str]) -> Iterator[Part]:
    group: list[str] = []
    size = 0
    for file in files:
        size += Path(file).stat().st_size
        group.append(file)
        if size >= PART_BYTES:
            yield Part(source, tuple(group))
            group, size = [], 0
    if group:
        yield Part(source, tuple(group))


def _jsonl_parts(source: JsonlSource, file: str) -> Iterator[Part]:
    size = Path(file).stat().st_size
    for start in range(0, size, PART_BYTES):
        yield Part(source, (file,), start, min(start + PART_BYTES, size))


def _read_jsonl(part: Part, field: str, reading: Reading) -> Iterator[str]:
    (file,) = part.files
    with open(file, "rb") as lines:
        if part.start:  # the line that is under way here belongs to the part before
            lines.seek(part.start - 1)
            lines.readline()
        while (begin := lines.tell()) < part.stop:
            line = lines.readline()
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:  # JSON's error and UTF-8's are both this
                reading.skipped.append(f"{file}: the line at byte {begin} is not JSON")
                continue
            text = row.get(field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                keys = f"has {', '.join(row)}" if isinstance(row, dict) else "is no object"
                raise InputError(
                    f"{file}: the line at byte {begin} has no text in {field!r}; it {keys}. Set text_field of the source."
                )
            yield text
