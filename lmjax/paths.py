"""Paths that are on a disk or in an object store (``s3://``, ``gs://``), and this machine's cache of what a store has.

A store has no append, no rename and no lock. So nothing here pretends to be a file system: an object is written whole
or read whole, through etils.epath (fsspec underneath), and what others have to see in one step is one object, written
last. Credentials and endpoints come from where the store's own tools take them.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from etils import epath

from lmjax.errors import InputError

CHUNK_BYTES = 1 << 22


class Store(NamedTuple):
    """A kind of object store."""

    package: str
    """What fsspec reads it with."""
    extra: str
    """The extra of lmjax that brings the package."""
    advice: str
    """What to check where it cannot be reached."""


STORES = {
    "s3": Store(
        "s3fs",
        "s3",
        "the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE) and, for a store that is not "
        "Amazon's, AWS_ENDPOINT_URL",
    ),
    "gs": Store(
        "gcsfs", "gcs", "the credentials (`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS)"
    ),
}

ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
)
"""What the stores' libraries raise beside OSError."""


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is in an object store."""
    return "://" in os.fspath(path)


def as_path(path: epath.PathLike) -> epath.Path:
    """The path, of either kind. Raises InputError for a store that lmjax does not know or whose package is missing."""
    if is_remote(path):
        scheme = os.fspath(path).partition("://")[0]
        if scheme not in STORES:
            known = " and ".join(f"{name}://" for name in STORES)
            raise InputError(f"{path}: {scheme}:// is not known; a path is on a disk or begins with {known}")
        store = STORES[scheme]
        if importlib.util.find_spec(store.package) is None:
            raise InputError(
                f"{path}: the package {store.package} is not installed; install lmjax with the extra `{store.extra}`, "
                f"as in `pip install -e '.[{store.extra}]'`"
            )
        _see_what_others_write(scheme)
    return epath.Path(path)


def _see_what_others_write(scheme: str) -> None:
    """Switch off fsspec's memory of directories: other processes write what this one lists."""
    from fsspec.config import conf

    conf.setdefault("gcs" if scheme == "gs" else scheme, {}).setdefault("use_listings_cache", False)


@contextlib.contextmanager
def reaching(path: epath.PathLike) -> Iterator[None]:
    """Turn what a store, or the way to it, says against using ``path`` into an InputError; for a disk, do nothing."""
    try:
        yield
    except store_errors() as error:
        if not is_remote(path):
            raise
        scheme = os.fspath(path).partition("://")[0]
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: the object store cannot be used: {why.rstrip('.')}. Check the bucket's name and "
            f"{STORES[scheme].advice}."
        ) from error


def store_errors() -> tuple[type[Exception], ...]:
    """The errors with which the stores' libraries that were imported report trouble."""
    loaded = [(sys.modules.get(module), name) for module, name in ERRORS]
    return (OSError, *(getattr(module, name) for module, name in loaded if module is not None))


def cache_root() -> Path:
    """The directory on this machine for copies of what is in a store: $LMJAX_CACHE, or ~/.cache/lmjax."""
    return Path(os.environ.get("LMJAX_CACHE") or "~/.cache/lmjax").expanduser().absolute()


def working_directory(path: str) -> Path:
    """Where the files of a directory are written on this machine: in itself, or for a store in one in the cache."""
    if not is_remote(path):
        return Path(path)
    return cache_root() / "work" / hashlib.sha256(path.rstrip("/").encode()).hexdigest()[:16]


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Keep other processes and threads of this machine out of what bears this name in the cache."""
    lock = cache_root() / "locks" / name
    with using_cache():
        lock.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def using_cache() -> Iterator[None]:
    """Turn what the system says against writing in the cache into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{error.filename or cache_root()}: the cache of this machine cannot be written ({error.strerror or error})"
            "; make room, or set LMJAX_CACHE to a directory that can be written to"
        ) from error


def cache_entry(sha256: str) -> Path:
    """Where the bytes with this SHA-256 are in the cache, if they are."""
    return cache_root() / "objects" / sha256[:2] / sha256


def fetch(source: epath.Path, sha256: str, *, trusted: bool = False) -> Path:
    """A file of the cache with the bytes of ``source``, whose SHA-256 is known; downloaded where it is not there.

    A file that is there is hashed and, if it is damaged, fetched anew, unless it is ``trusted``: another process of
    this run did that. Any number of processes and threads may ask for the same bytes; one of them fetches. Raises
    InputError for an object that is missing or damaged in the store.
    """
    entry = cache_entry(sha256)
    if trusted and entry.is_file():
        return entry
    with locked(sha256[:2]):
        if not entry.is_file() or sha256_of(entry) != sha256:
            with using_cache():
                entry.parent.mkdir(parents=True, exist_ok=True)
            with _unfinished(entry) as unfinished:
                found = download(source, unfinished)
                if found != sha256:
                    raise InputError(f"{source}: damaged: its SHA-256 is {found[:16]}…, and {sha256[:16]}… was written")
    return entry


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(source: epath.Path, target: Path) -> str:
    """Copy an object into a file and return the SHA-256 of what was read. Raises InputError where it cannot be."""
    digest = hashlib.sha256()
    with using_cache():
        file = target.open("wb")
    with file:
        with reaching(source):
            try:
                stream = source.open("rb")
            except FileNotFoundError:
                raise InputError(f"{source}: missing in the object store") from None
        with stream:
            while True:
                with reaching(source):
                    chunk = stream.read(CHUNK_BYTES)
                if not chunk:
                    break
                digest.update(chunk)
                with using_cache():
                    file.write(chunk)
    return digest.hexdigest()


def upload(source: Path, target: epath.Path) -> None:
    """Copy a file into the store, where it is one object; a kill leaves the object as it was before, or none."""
    with reaching(target), source.open("rb") as file, target.open("wb") as stream:
        shutil.copyfileobj(file, stream, CHUNK_BYTES)


def write_object(target: epath.Path, content: bytes) -> None:
    """Write a small object in one request."""
    with reaching(target):
        target.write_bytes(content)


class Mirror:
    """A directory in a store whose files are written, and appended to, in ``working_directory`` and copied as a whole.

    For a directory on a disk there is nothing to copy, and every call returns at once. One process of a run uses it.
    """

    def __init__(self, directory: str) -> None:
        """Raises InputError for a store that lmjax does not know or whose package is missing."""
        self.local = working_directory(directory)
        self._remote = as_path(directory) if is_remote(directory) else None
        self._copied: dict[str, tuple[int, int]] = {}

    def pull(self, names: Iterable[str]) -> None:
        """Make the files of these names on this machine what the store has; those that it has not are removed here."""
        if self._remote is None:
            return
        with using_cache():
            self.local.mkdir(parents=True, exist_ok=True)
        for name in names:
            with reaching(self._remote):
                there = (self._remote / name).exists()
            if there:
                with _unfinished(self.local / name) as unfinished:
                    download(self._remote / name, unfinished)
                self._copied[name] = _stamp(self.local / name)
            else:
                (self.local / name).unlink(missing_ok=True)

    def push(self) -> None:
        """Copy the files that have changed since they were last copied, hidden ones left out."""
        if self._remote is None:
            return
        for file in sorted(self.local.rglob("*")):
            name = file.relative_to(self.local).as_posix()
            if not file.is_file() or any(part.startswith(".") for part in Path(name).parts):
                continue
            stamp = _stamp(file)
            if self._copied.get(name) != stamp:
                upload(file, self._remote / name)
                self._copied[name] = stamp


def _stamp(file: Path) -> tuple[int, int]:
    """What changes when a file does: its size and when it was written."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    """A path to write to; what is there at the end becomes ``path`` in one step, or nothing does."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield unfinished
        with using_cache():
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
