"""Parquet files, read a row group and in it some rows at a time, so that memory stays bounded."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from lmjax.data.fields import Template, first_key
from lmjax.data.index import SkippedInput
from lmjax.data.records import Texts, refuse_column, text_or_skipped
from lmjax.errors import InputError

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

READ_BYTES = 2**22
"""Rows are read by about so many bytes, and by no more than ``READ_ROWS``."""
READ_ROWS = 4096


def read_parquet(stream: BinaryIO, path: str, name: str, template: Template, start: int, stop: int) -> Texts:
    """The texts of the row groups that begin between two bytes of the file.

    Raises InputError for a file that is no Parquet or is damaged, and for a column that is not there or is no text.
    """
    with _open(stream, path) as file:
        columns = check_parquet_columns(file, path, template)
        row = 0
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            if group.num_rows and start <= _start(group) < stop:
                yield from _read_group(file, number, columns, name, template, row)
            row += group.num_rows


def check_parquet(stream: BinaryIO, path: str, template: Template) -> None:
    """Raises what ``read_parquet`` does, by the file's end alone."""
    with _open(stream, path) as file:
        check_parquet_columns(file, path, template)


def check_parquet_columns(file: "pyarrow.parquet.ParquetFile", path: str, template: Template) -> list[str]:
    """The columns to be read, nested ones as dotted paths, as far as they are structs."""
    import pyarrow.types as types

    schema = file.schema_arrow
    columns = []
    for field in template.columns:
        key = first_key(field, schema.names)
        if key is None:
            refuse_column(path, field, schema.names)
        declared, column, nested = schema.field(key).type, key, True
        for part in field[len(key) + 1 :].split(".") if key != field else ():
            if types.is_struct(declared):
                inner = [declared.field(number).name for number in range(declared.num_fields)]
                if part not in inner:
                    refuse_column(path, field, [f"{column}.{name}" for name in inner])
                declared, column = declared.field(part).type, f"{column}.{part}" if nested else column
            elif (types.is_list(declared) or types.is_large_list(declared)) and part.isdecimal():
                declared, nested = declared.value_type, False
            else:
                refuse_column(path, field, [f"{column} of type {declared}"])
        declared = declared.value_type if types.is_dictionary(declared) else declared
        if not (types.is_string(declared) or types.is_large_string(declared) or types.is_string_view(declared)):
            raise InputError(f"data.sources: {path}: the column {field!r} is {declared}, not text; choose another one")
        columns.append(column)
    return columns


@contextlib.contextmanager
def _open(stream: BinaryIO, path: str) -> "Iterator[pyarrow.parquet.ParquetFile]":
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(
            stream, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True
        ) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        why = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"data.sources: {path} is no Parquet file, or a broken one ({why}); copy it anew, or leave it out"
        ) from error


def _start(group: Any) -> int:
    column = group.column(0)
    offsets = (column.dictionary_page_offset, column.data_page_offset)
    return min(offset for offset in offsets if offset)


def _read_group(
    file: "pyarrow.parquet.ParquetFile", number: int, columns: list[str], name: str, template: Template, row: int
) -> Texts:
    group = file.metadata.row_group(number)
    each = max(group.total_byte_size // group.num_rows, 1)
    batch_size = min(max(READ_BYTES // each, 1), READ_ROWS)
    for batch in file.iter_batches(batch_size, row_groups=[number], columns=columns, use_threads=False):
        for found in _rows(batch):
            if isinstance(found, UnicodeDecodeError):
                yield SkippedInput(name=f"{name}, row {row}", reason="not UTF-8")
            else:
                yield text_or_skipped(found, template, f"{name}, row {row}")
            row += 1


def _rows(batch: "pyarrow.RecordBatch") -> Iterator[Any]:
    """Each row as Python values, or the error of one whose bytes are no text."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for number in range(batch.num_rows):
            try:
                row = batch.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                row = error
            yield row
