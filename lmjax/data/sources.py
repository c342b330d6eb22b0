"""From sources to texts: which files there are, how they are shared out as work, and what is read from them."""

import glob
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from lmjax.data.config import Content, FilesSource, JsonlSource, Source, StdlibSource
from lmjax.data.index import SkippedInput
from lmjax.errors import InputError

PROSE_EXTENSIONS = (".markdown", ".md", ".rst", ".txt")
# fmt: off
CODE_EXTENSIONS = (
    ".bash", ".c", ".cc", ".clj", ".cpp", ".cs", ".css", ".cu", ".cxx", ".dart", ".ex", ".exs", ".erl", ".f90",
    ".go", ".h", ".hpp", ".hs", ".html", ".java", ".jl", ".js", ".jsx", ".kt", ".lean", ".lisp", ".lua", ".m",
    ".ml", ".mli", ".php", ".pl", ".proto", ".ps1", ".py", ".pyi", ".pyx", ".r", ".rb", ".rs", ".scala", ".scm",
    ".sh", ".sql", ".swift", ".tex", ".toml", ".ts", ".tsx", ".v", ".vue", ".yaml", ".yml", ".zig",
)
# fmt: on
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"})
DOCUMENT_BYTES = 4 * 2**20
"""A text file that is longer is cut, at ends of lines, into documents of about this size: memory stays bounded."""
LINE_SEARCH_BYTES = 2**16
"""How far the end of a line is looked for; after that a text file is cut between two characters."""


class InputFile(NamedTuple):
    """One file of a source."""

    path: str
    name: str
    """Relative to its source, with slashes: the same wherever the source lies."""
    source: int
    """Place of its source in the config."""
    size: int
    """Bytes."""
    mtime_ns: int
    content: Content
    text_field: str | None
    """Key of a line's text in a jsonl file; None for a text file."""


class Piece(NamedTuple):
    """Bytes of a file. A line, or a document, belongs to the piece in which it starts."""

    file: InputFile
    start: int
    stop: int


def list_files(sources: Sequence[Source]) -> list[InputFile]:
    """Every file of the sources, source after source, each sorted by name.

    Raises InputError for a source that has none.
    """
    files = []
    for number, source in enumerate(sources):
        found = [
            InputFile(
                path, _printable(name), number, *_size_and_time(path), content, getattr(source, "text_field", None)
            )
            for name, path, content in _named_files(source, f"data.sources.{number}")
        ]
        files += sorted(found, key=lambda file: (file.name, file.path))
    return files


def cut(files: Sequence[InputFile], jsonl_bytes: int) -> Iterator[Piece]:
    """The pieces of all files in order; a jsonl file is cut every ``jsonl_bytes``."""
    for file in files:
        step = jsonl_bytes if file.text_field is not None else DOCUMENT_BYTES
        for start in range(0, max(file.size, 1), step):
            yield Piece(file, start, min(start + step, file.size))


def read_texts(piece: Piece) -> Iterator[str | SkippedInput]:
    """The texts of a piece in order, as they are in the file, and what had to be skipped.

    Raises InputError for a file that cannot be opened.
    """
    file = piece.file
    try:
        with open(file.path, "rb") as stream:
            if file.text_field is not None:
                yield from _read_lines(stream, piece, file.text_field)
            else:
                start = _line_start(stream, piece.start, file.size)
                content = stream.read(_line_start(stream, piece.stop, file.size, back_to=start) - start)
                whole = piece.start == 0 and piece.stop == file.size
                yield _decode(content, file.name if whole else f"{file.name} from byte {start}")
    except OSError as error:
        _refuse(error)


def _named_files(source: Source, where: str) -> Iterator[tuple[str, str, Content]]:
    match source:
        case StdlibSource():
            root = sysconfig.get_path("stdlib")
            for name, path in _walk(root, (".py", ".rst", ".txt", ".md"), NOT_STDLIB):
                yield name, path, "code" if name.endswith(".py") else "prose"
        case JsonlSource():
            for name, path in _find(source.path, (".jsonl",), where):
                yield name, path, source.content
        case FilesSource():
            if source.extensions is not None and not os.path.isdir(source.path):
                raise InputError(
                    f"{where}.extensions: it chooses among the files of a directory, and {source.path} is none; "
                    "leave it out"
                )
            usual = PROSE_EXTENSIONS if source.content == "prose" else CODE_EXTENSIONS
            for name, path in _find(source.path, source.extensions or usual, where):
                yield name, path, source.content


def _find(path: str, extensions: tuple[str, ...], where: str) -> list[tuple[str, str]]:
    """(name, path) of a file, of the files of a directory that have the extensions, or of those that a glob matches."""
    if os.path.isfile(path):
        return [(os.path.basename(path), path)]
    if os.path.isdir(path):
        found = list(_walk(path, extensions, frozenset()))
        missing = f"no file in the directory {path} ends in {', '.join(extensions)}"
    elif glob.has_magic(path):
        parts = Path(path).parts
        fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
        root = os.path.join(*parts[:fixed]) if fixed else "."
        matches = [match for match in glob.iglob(path, recursive=True) if os.path.isfile(match)]
        found = [(Path(os.path.relpath(match, root)).as_posix(), match) for match in matches]
        missing = f"the glob {path} matches no file"
    else:
        found, missing = [], f"there is no file or directory {path}"
    if not found:
        raise InputError(f"{where}.path: {missing}; name a file, a directory or a glob that has text")
    return found


def _walk(root: str, extensions: tuple[str, ...], left_out: frozenset[str]) -> Iterator[tuple[str, str]]:
    for directory, inner, names in os.walk(root, onerror=_refuse):
        inner[:] = [name for name in inner if not name.startswith(".") and name not in left_out]
        for name in names:
            path = os.path.join(directory, name)
            if name.endswith(extensions) and os.path.isfile(path):
                yield Path(os.path.relpath(path, root)).as_posix(), path


def _printable(name: str) -> str:
    """A name with bytes that are no UTF-8 written as \\xNN, so that it can be written down."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        _refuse(error)
    return status.st_size, status.st_mtime_ns


def _refuse(error: OSError) -> NoReturn:
    raise InputError(
        f"data.sources: {error.filename} cannot be read ({error.strerror}); make it readable, or leave it out"
    ) from None


def _decode(content: bytes, name: str) -> str | SkippedInput:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return SkippedInput(name=name, reason=f"not UTF-8 ({error.reason} at byte {error.start})")


def _read_lines(stream: BinaryIO, piece: Piece, text_field: str) -> Iterator[str | SkippedInput]:
    if piece.start:
        stream.seek(piece.start - 1)
        stream.readline()
    while (offset := stream.tell()) < piece.stop:
        line = _decode(stream.readline(), f"{piece.file.name}, line at byte {offset}")
        if isinstance(line, SkippedInput):
            yield line
        elif line.strip():
            yield _text_of(line, text_field, f"{piece.file.name}, line at byte {offset}")


def _text_of(line: str, text_field: str, name: str) -> str | SkippedInput:
    try:
        text = json.loads(line)[text_field]
    except (ValueError, RecursionError):
        return SkippedInput(name=name, reason="not JSON")
    except (KeyError, TypeError, IndexError):
        return SkippedInput(name=name, reason=f"no object with the key {text_field!r}")
    if not isinstance(text, str):
        return SkippedInput(name=name, reason=f"the value of {text_field!r} is not text")
    return text


def _line_start(stream: BinaryIO, offset: int, size: int, back_to: int | None = None) -> int:
    """The first place from ``offset`` on at which a line starts, or else a character; 0 and ``size`` stay.

    The stream stands there afterwards, or at ``back_to``.
    """
    if 0 < offset < size:
        stream.seek(offset - 1)
        window = stream.read(LINE_SEARCH_BYTES)
        end = window.find(b"\n")
        if end >= 0:
            offset += end
        elif offset - 1 + len(window) >= size:
            offset = size
        else:
            # Bytes 10xxxxxx go on with a character; there are at most three in a row.
            following = window[1:4]
            offset += next((more for more, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))
    stream.seek(offset if back_to is None else back_to)
    return offset
