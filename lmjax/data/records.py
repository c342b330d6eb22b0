"""Files with a document a row: JSON lines, comma-separated values, Parquet.

What is wrong with one row is told as SkippedInput, and the next row is read; what is wrong with a whole file (a column
that it has not, an archive that breaks) is an InputError.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NoReturn

from lmjax.data.fields import NoText, Template, text_of
from lmjax.data.index import SkippedInput
from lmjax.errors import InputError

MAX_VALUE_CHARACTERS = 2**27
"""Of one value of a csv file: a quote that is never closed does not take the rest of the file into memory."""
_NOT_UNICODE = re.compile("[\udc80-\udcff]")

Texts = Iterator[str | SkippedInput]


def decode(content: bytes, name: str) -> str | SkippedInput:
    """Bytes as text, without a byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return SkippedInput(name=name, reason=f"not UTF-8 ({error.reason} at byte {error.start})")


def read_jsonl(stream: BinaryIO, name: str, template: Template, start: int, stop: int | None) -> Texts:
    """The texts of the lines that begin between two bytes; ``stop`` None reads to the end."""
    offset = start
    if start:
        stream.seek(start - 1)
        offset += len(stream.readline()) - 1
    while stop is None or offset < stop:
        content = stream.readline()
        if not content:
            return
        where = f"{name}, line at byte {offset}"
        offset += len(content)
        line = decode(content, where)
        if isinstance(line, SkippedInput):
            yield line
        elif line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                yield SkippedInput(name=where, reason="not JSON")
            else:
                yield text_or_skipped(row, template, where)


def read_csv(stream: BinaryIO, path: str, name: str, template: Template, delimiter: str) -> Texts:
    """The texts of the rows below the header. Raises InputError where that lacks a column."""
    csv.field_size_limit(MAX_VALUE_CHARACTERS)
    # Bytes that are no UTF-8 pass through as halves of surrogate pairs, so that they spoil their own row alone.
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter)
    try:
        header = next(reader, None)
        if header is None:
            return
        for column in template.columns:
            if column not in header:
                refuse_column(path, column, header)
        for values in reader:
            where = f"{name}, line {reader.line_num}"
            if len(values) == len(header):
                found = text_or_skipped(dict(zip(header, values, strict=True)), template, where)
                if isinstance(found, str) and _NOT_UNICODE.search(found):
                    found = SkippedInput(name=where, reason="not UTF-8")
                yield found
            elif values:
                yield SkippedInput(name=where, reason=f"{len(values)} values, and the header has {len(header)}")
    except csv.Error as error:
        raise InputError(
            f"data.sources: {path}, line {reader.line_num}: {error}; close the quote before, or leave the file out"
        ) from None
    finally:
        text.detach()


def find_columns(stream: BinaryIO, template: Template) -> tuple[bool, list[str]]:
    """Whether a line of a jsonl file has a text where the template looks for one, and else the keys of the first."""
    keys: list[str] | None = None
    for line in stream:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            keys = list(row) if keys is None else keys
            try:
                text_of(row, template)
            except NoText:
                continue
            return True, []
    return False, keys or []


def refuse_column(path: str, column: str, there: Sequence[str]) -> NoReturn:
    """Say that a file has no such column, and which ones it has."""
    raise InputError(
        f"data.sources: {path} has no column {column!r}; it has {', '.join(map(repr, there)) or 'none'}; "
        "set text_field to one of them"
    )


def text_or_skipped(row: Any, template: Template, where: str) -> str | SkippedInput:
    """The text of a row, or why there is none, under the row's name ``where``."""
    try:
        return text_of(row, template)
    except NoText as error:
        return SkippedInput(name=where, reason=str(error))
