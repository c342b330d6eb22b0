"""From sources to texts: which files there are, how they are shared out as work, and what is read from them."""

import itertools
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from lmjax.data import text_files
from lmjax.data.archives import open_packed, open_unpacked
from lmjax.data.config import Content, CsvSource, FilesSource, Source, StdlibSource, TableSource
from lmjax.data.fields import Template, parse_template
from lmjax.data.find import Found, find_files, walk
from lmjax.data.index import SkippedInput
from lmjax.data.input_files import InputFile, InputFiles
from lmjax.data.parquet import check_parquet, read_parquet
from lmjax.data.records import decode, find_columns, read_csv, read_jsonl, refuse_column
from lmjax.data.text_files import read_document, stream_documents
from lmjax.errors import InputError
from lmjax.paths import is_remote

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


class Piece(NamedTuple):
    """Bytes of a file as it is stored. A line, a document or a row group belongs to the piece in which it starts."""

    file: InputFile
    start: int
    stop: int


def list_files(sources: Sequence[Source]) -> InputFiles:
    """Every file of the sources, source after source, each sorted by name.

    Raises InputError for a source that has none.
    """
    files = InputFiles()
    for number, source in enumerate(sources):
        found = InputFiles(
            InputFile(
                path=file.path,
                name=file.name,
                source=number,
                size=file.size,
                mtime_ns=file.stamp,
                content=content,
                kind="files" if isinstance(source, StdlibSource) else source.kind,
                text_field=source.text_field if isinstance(source, TableSource) else "",
                delimiter=source.delimiter if isinstance(source, CsvSource) else "",
            )
            for file, content in _find(source, f"data.sources.{number}")
        )
        files.extend_sorted(found)
    return files


def check_columns(files: Sequence[InputFile]) -> None:
    """Raise InputError for the first file without the column that its text is to be in, or that is broken.

    That of a table is told by its header; a jsonl file may have lines of several kinds, so that all files of a source
    have to be without it.
    """
    for _, of_source in itertools.groupby(files, key=lambda file: file.source):
        first = next(of_source)
        if first.kind == "jsonl":
            _check_keys(itertools.chain([first], of_source), first.text_field)
        elif first.text_field:
            template = parse_template(first.text_field)
            for file in itertools.chain([first], of_source):
                _check_table(file, template)


def cut(files: Iterable[InputFile], table_bytes: int, start: int = 0) -> Iterator[Piece]:
    """The pieces of all files in order, from byte ``start`` of the first, which is where a piece of it begins.

    A file with a document a row is cut every ``table_bytes``, if it can be.
    """
    for file in files:
        step = table_bytes if file.kind != "files" else text_files.DOCUMENT_BYTES
        if not file.is_cut:
            step = max(file.size, 1)
        for start_of_piece in range(start, max(file.size, 1), step):
            yield Piece(file, start_of_piece, min(start_of_piece + step, file.size))
        start = 0


def read_texts(piece: Piece) -> Iterator[str | SkippedInput]:
    """The texts of a piece in order, as they are in the file, and what had to be skipped.

    Raises InputError for a file that cannot be opened, is a broken archive, or has not the column that is asked for.
    """
    file = piece.file
    if file.kind == "files":
        yield from _read_text_file(piece)
        return
    template = parse_template(file.text_field)
    with open_packed(file.path) if file.kind == "parquet" else open_unpacked(file.path) as stream:
        match file.kind:
            case "jsonl":
                stop = piece.stop if file.is_cut else None
                yield from read_jsonl(stream, file.name, template, piece.start, stop)
            case "csv":
                yield from read_csv(stream, file.path, file.name, template, file.delimiter)
            case "parquet":
                yield from read_parquet(stream, file.path, file.name, template, piece.start, piece.stop)


def _read_text_file(piece: Piece) -> Iterator[str | SkippedInput]:
    file = piece.file
    with open_unpacked(file.path) as stream:
        if file.is_cut:
            whole = piece.start == 0 and piece.stop == file.size
            start, content = read_document(stream, piece.start, piece.stop, file.size)
            yield decode(content, file.name if whole else f"{file.name} from byte {start}")
        else:
            for start, content in stream_documents(stream):
                yield decode(content, f"{file.name} from byte {start}" if start else file.name)


def _check_keys(files: Iterable[InputFile], text_field: str) -> None:
    template = parse_template(text_field)
    first: tuple[str, list[str]] | None = None
    for file in files:
        with open_unpacked(file.path) as stream:
            found, keys = find_columns(stream, template)
        if found:
            return
        if keys and first is None:
            first = file.path, keys
    if first is not None:
        refuse_column(first[0], text_field, first[1])


def _check_table(file: InputFile, template: Template) -> None:
    if file.kind == "csv":
        with open_unpacked(file.path) as stream:
            next(read_csv(stream, file.path, file.name, template, file.delimiter), None)
    elif file.kind == "parquet":
        with open_packed(file.path) as stream:
            check_parquet(stream, file.path, template)


def _find(source: Source, where: str) -> Iterator[tuple[Found, Content]]:
    match source:
        case StdlibSource():
            for file in walk(sysconfig.get_path("stdlib"), (".py", ".rst", ".txt", ".md"), NOT_STDLIB):
                yield file, "code" if file.name.endswith(".py") else "prose"
        case TableSource():
            for file in find_files(source.path, (f".{source.kind}",), where):
                yield file, source.content
        case FilesSource():
            if source.extensions is not None and not (is_remote(source.path) or os.path.isdir(source.path)):
                raise InputError(
                    f"{where}.extensions: it chooses among the files of a directory, and {source.path} is none; "
                    "leave it out"
                )
            usual = PROSE_EXTENSIONS if source.content == "prose" else CODE_EXTENSIONS
            for file in find_files(source.path, source.extensions or usual, where):
                yield file, source.content
