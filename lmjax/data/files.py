"""Writing files so that a kill leaves the whole file or none, and saying in words why one cannot be written."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from lmjax.errors import InputError

REMEDIES = {
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOTDIR: "part of the path is a file; choose another place",
    errno.EEXIST: "a file is in the way; choose another place",
    errno.EISDIR: "a directory is in the way; choose another place",
    errno.ENOSPC: "free some space or choose another disk, then run the same command again: it goes on",
    errno.EDQUOT: "free some of your quota or choose another disk, then run the same command again: it goes on",
    errno.EFBIG: "raise the limit on file sizes or choose another disk, then run the same command again: it goes on",
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says against writing ``path`` into an InputError; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        raise InputError(f"{path}: cannot be written ({os.strerror(error.errno)}); {REMEDIES[error.errno]}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to; what is there at the end becomes ``path`` in one step, or nothing does."""
    # A name of its own: a worker that outlives a killed command may still be writing the same file.
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with writing(path):
        try:
            yield unfinished
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file in one step."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(content)
