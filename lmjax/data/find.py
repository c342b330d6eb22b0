"""The files of a source: one, those of a directory, or those that a glob matches; on a disk or in an object store."""

import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lmjax.data.archives import COMPRESSIONS, refuse
from lmjax.errors import InputError
from lmjax.paths import as_path, is_remote, reaching


class Found(NamedTuple):
    """A file."""

    name: str
    """Relative to what was searched, with slashes; a byte that is no UTF-8 is written as \\xNN."""
    path: str
    size: int
    """Bytes."""
    stamp: int
    """Another number when its content is another: the time at which it was written, in nanoseconds, on a disk."""


def find_files(path: str, extensions: tuple[str, ...], where: str) -> Iterator[Found]:
    """A file, the files of a directory that have the extensions, or those that a glob matches, in no order.

    Packed files have their extension before .gz or .zst. ``where`` is the key in the config, for the InputError that is
    raised where there is none.
    """
    if is_remote(path):
        found, missing = _find_remote(path, extensions)
    elif os.path.isfile(path):
        found, missing = iter([_on_disk(os.path.basename(path), path)]), ""
    elif os.path.isdir(path):
        found = walk(path, extensions)
        missing = f"no file in the directory {path} ends in {', '.join(extensions)}"
    elif glob.has_magic(path):
        root = _fixed_part(path)
        matches = (match for match in glob.iglob(path, recursive=True) if os.path.isfile(match))
        found = (_on_disk(Path(os.path.relpath(match, root)).as_posix(), match) for match in matches)
        missing = f"the glob {path} matches no file"
    else:
        found, missing = iter(()), f"there is no file or directory {path}"
    first = next(found, None)
    if first is None:
        raise InputError(f"{where}.path: {missing}; name a file, a directory or a glob that has text")
    yield first
    yield from found


def walk(root: str, extensions: tuple[str, ...], left_out: frozenset[str] = frozenset()) -> Iterator[Found]:
    """The files of a directory on a disk, to the bottom, without hidden directories and those ``left_out``."""
    for directory, inner, names in os.walk(root, onerror=lambda error: refuse(error, root)):
        inner[:] = [name for name in inner if not name.startswith(".") and name not in left_out]
        place = Path(os.path.relpath(directory, root)).as_posix()
        before = "" if place == "." else f"{place}/"
        for name in names:
            path = os.path.join(directory, name)
            if _unpacked_name(name).endswith(extensions) and os.path.isfile(path):
                yield _on_disk(before + name, path)


def _find_remote(path: str, extensions: tuple[str, ...]) -> tuple[Iterator[Found], str]:
    """What there is in a store, by one listing, and what to say if it is nothing."""
    import fsspec

    as_path(path)
    scheme = path.partition("://")[0]
    with reaching(path):
        system, place = fsspec.core.url_to_fs(path)
        if glob.has_magic(place):
            root, found = _fixed_part(place), system.glob(place, detail=True)
            missing = f"the glob {path} matches no object"
        else:
            root, found = place.rstrip("/"), system.find(place, detail=True)
            missing = f"there is no object {path}, and none below it ends in {', '.join(extensions)}"
            if list(found) == [root]:
                return iter([_in_store(os.path.basename(root), scheme, root, found[root])]), missing
            found = {key: info for key, info in found.items() if _unpacked_name(key).endswith(extensions)}
    return (
        _in_store(key.removeprefix(f"{root}/"), scheme, key, info)
        for key, info in found.items()
        if info["type"] == "file" and "/." not in key.removeprefix(root)
    ), missing


def _in_store(name: str, scheme: str, key: str, info: dict[str, Any]) -> Found:
    version = [str(info[field]) for field in ("ETag", "etag", "LastModified", "updated") if field in info]
    stamp = int.from_bytes(hashlib.sha256(" ".join(version).encode()).digest()[:8], "little")
    return Found(name, f"{scheme}://{key}", int(info["size"]), stamp)


def _on_disk(name: str, path: str) -> Found:
    try:
        status = os.stat(path)
    except OSError as error:
        refuse(error, path)
    return Found(os.fsencode(name).decode(errors="backslashreplace"), path, status.st_size, status.st_mtime_ns)


def _fixed_part(pattern: str) -> str:
    """The directory that all matches of a glob are in."""
    parts = Path(pattern).parts
    fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return os.path.join(*parts[:fixed]) if fixed else "."


def _unpacked_name(name: str) -> str:
    """The name of what is in a file: without .gz or .zst at its end."""
    return next((name.removesuffix(end) for end in COMPRESSIONS if name.endswith(end)), name)
