"""A directory that is there whole or not at all, and messages about disks that are full."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lmjax.errors import InputError

REMEDIES = {
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.EROFS: "choose a place that can be written to",
    errno.EEXIST: "part of the path is a file; choose another place",
    errno.ENOTDIR: "part of the path is a file; choose another place",
    errno.ENOSPC: "make room or choose another disk, then run the command again",
    errno.EDQUOT: "free some of your quota or choose another disk, then run the command again",
    errno.EFBIG: "raise the limit on file sizes or choose another disk, then run the command again",
}


@contextlib.contextmanager
def new_directory(out: str | Path) -> Iterator[Path]:
    """A directory beside ``out`` to write to, which becomes ``out`` when the block ends, and is removed if it fails.

    What a killed process left there is removed. Raises InputError where ``out`` is in an object store, is there and not
    empty, cannot be written to, or is being written by another process, and for a full disk within the block.
    """
    if "://" in str(out):
        raise InputError(f"{out}: a model is converted on a disk; give a local directory, and copy it there afterwards")
    out = Path(out).expanduser().absolute()
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out}: not a directory; give one that is not there yet")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: not empty; give a directory that is not there yet")
    unfinished = out.with_name(f".{out.name}.unfinished")
    with _explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with _claimed(unfinished):
            try:
                yield unfinished
                _sync_tree(unfinished)
                unfinished.replace(out)
                _sync(out.parent)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise


@contextlib.contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    """Make ``directory`` anew, for this process alone."""
    directory.mkdir(exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{directory}: another process is writing here; wait for it, or end it") from None
        for left in directory.iterdir():
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Turn what the system says against writing into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno not in REMEDIES:
            raise
        what = os.strerror(error.errno)
        raise InputError(f"{out}: cannot be written ({what}); {REMEDIES[error.errno]}") from error


def _sync_tree(directory: Path) -> None:
    """Directories and small files; what wrote the large ones has synced them."""
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
