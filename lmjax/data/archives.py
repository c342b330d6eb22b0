"""The bytes of a source's file: on a disk or in an object store, plain, or unpacked from .gz or .zst while read."""

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NoReturn, cast

from lmjax.errors import InputError
from lmjax.paths import as_path, is_remote, reaching

COMPRESSIONS = (".gz", ".zst")
"""What the name of a file ends in that is unpacked: nothing of it can be read but from its beginning."""
BUFFER_BYTES = 2**20


def is_archive(name: str) -> bool:
    """Whether the file of this name is unpacked as it is read."""
    return name.endswith(COMPRESSIONS)


@contextlib.contextmanager
def open_packed(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file as they are stored. Raises InputError, within the block too, where they cannot be read."""
    if is_remote(path):
        with reaching(path), as_path(path).open("rb") as stream:
            yield cast(BinaryIO, stream)
        return
    try:
        with open(path, "rb") as stream:
            yield stream
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        refuse(error, path)


@contextlib.contextmanager
def open_unpacked(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked if its name says so. Raises InputError, within the block too, for a broken one."""
    with open_packed(path) as packed:
        if path.endswith(".gz"):
            try:
                with gzip.GzipFile(fileobj=packed) as stream:
                    yield cast(BinaryIO, stream)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                _refuse_archive(path, "gzip", error)
        elif path.endswith(".zst"):
            import pyarrow

            try:
                with pyarrow.CompressedInputStream(packed, "zstd") as stream:
                    yield io.BufferedReader(stream, BUFFER_BYTES)
            except OSError as error:
                if error.errno is not None:
                    raise
                _refuse_archive(path, "zstd", error)
        else:
            yield packed


def refuse(error: OSError, path: str) -> NoReturn:
    """Say of a file that the system does not let it be read."""
    raise InputError(
        f"data.sources: {error.filename or path} cannot be read ({error.strerror}); make it readable, or leave it out"
    ) from None


def _refuse_archive(path: str, kind: str, error: Exception) -> NoReturn:
    why = str(error).rstrip(".")
    raise InputError(
        f"data.sources: {path} is a broken {kind} archive ({why}); copy it anew, or leave it out"
    ) from error
