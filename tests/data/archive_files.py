"""Writing packed and tabular files for tests."""

import csv
import gzip
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet


def write_packed(path: Path, content: bytes) -> None:
    """Packed as the name's end says."""
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    elif path.suffix == ".zst":
        content = bytes(pyarrow.compress(content, "zstd", asbytes=True))
    path.write_bytes(content)


def csv_bytes(rows: Sequence[Sequence[str]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue().encode()


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], rows_a_group: int) -> None:
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(list(rows)), path, row_group_size=rows_a_group, write_page_checksum=True
    )
