"""The manifest of a checkpoint: the SHA-256 and size of every file, what the arrays are, and what the run was.

Orbax finds no damage in the arrays themselves: after one flipped bit it restores wrong values without an error. So a
step counts as saved when its manifest is there, and as good when every file is what the manifest says. Layout:
``<directory>/<step>/manifest.json`` beside what Orbax wrote, one directory for each part (top-level key) of the state.

This module needs neither JAX nor Orbax: a checkpoint is listed and verified on any machine.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import typing
from collections.abc import Iterable, Iterator, Mapping

from etils import epath

from lmjax.errors import InputError
from lmjax.paths import as_path, is_remote, reaching, store_errors, write_object

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
UPLOADING = ".uploading"
"""In a step's directory in an object store: an upload has begun. Without a manifest beside it, it did not end."""
CHUNK_BYTES = 1 << 22
HASH_THREADS = min(16, 2 * (os.cpu_count() or 1))


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """What a file was when it was written."""

    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal."""


@dataclasses.dataclass(frozen=True)
class LeafEntry:
    """What an array is."""

    shape: tuple[int, ...]
    dtype: str
    """As NumPy and ml_dtypes name it, such as ``bfloat16``."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What one saved step holds."""

    step: int
    metadata: dict[str, typing.Any]
    """What the caller gave: JSON values only."""
    leaves: dict[str, LeafEntry]
    """By path in the state, such as ``params/embed/table``."""
    files: dict[str, FileEntry]
    """By path relative to the step's directory, the manifest itself excluded."""

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return sum(entry.size for entry in self.files.values())

    def of_part(self, part: str) -> list[str]:
        """The files that hold ``part`` of the state, and those that belong to every part."""
        return [name for name in self.files if name.split("/")[0] == part or "/" not in name]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What verifying one step found."""

    step: int
    num_files: int
    num_bytes: int
    problems: tuple[str, ...]
    """Empty for a good step."""


def list_steps(directory: epath.PathLike) -> list[int]:
    """The steps that were committed in ``directory``, ascending; good or not. Uploads that did not end are left out."""
    directory = as_path(directory)
    try:
        with reaching(directory):
            paths = [path for path in directory.iterdir() if path.name.isdecimal()] if directory.exists() else []
            if is_remote(directory):
                paths = [path for path in paths if not is_unfinished(path)]
    except OSError as error:
        raise InputError(
            f"{directory}: cannot list the checkpoints: {error}. Give a directory of checkpoints."
        ) from error
    return sorted(int(path.name) for path in paths)


def is_unfinished(step_directory: epath.Path) -> bool:
    """Whether an upload of this step began and did not end."""
    return (step_directory / UPLOADING).exists() and not (step_directory / MANIFEST).exists()


def describe_files(step_directory: epath.Path, *, sync: bool = False) -> dict[str, FileEntry]:
    """Size and hash of every file in ``step_directory``, read in parallel. Names that begin with a dot are left out.

    With ``sync`` they are durable afterwards, where they were only written; on a disk.
    """

    def describe(name: str) -> FileEntry:
        entry = _describe(step_directory / name)
        if sync:
            with (step_directory / name).open("rb") as file:
                os.fsync(file.fileno())
        return entry

    names = sorted(_file_names(step_directory))
    with concurrent.futures.ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(names, pool.map(describe, names), strict=True))


def write_manifest(step_directory: epath.Path, manifest: Manifest) -> None:
    """Write the manifest in one atomic move, or as one object. It holds a hash of itself."""
    content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)}
    text = json.dumps({"sha256": _content_hash(content), **content}, indent=1)
    if is_remote(step_directory):
        write_object(step_directory / MANIFEST, text.encode())
        return
    temporary = step_directory / f".{MANIFEST}"
    temporary.write_text(text)
    temporary.replace(step_directory / MANIFEST)


def read_manifest(directory: epath.PathLike, step: int) -> Manifest:
    """The manifest of ``step``: its metadata and arrays, with no array read.

    Raises InputError where it is missing (the save was cut short), damaged, or of a newer format.
    """
    path = as_path(directory) / str(step) / MANIFEST
    try:
        content = json.loads(path.read_bytes())
        recorded = content.pop("sha256")
    except FileNotFoundError:
        raise InputError(f"{path.parent}: no {MANIFEST}: the save was stopped before it was finished") from None
    except (*store_errors(), ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: not readable: {error}") from error
    if recorded != _content_hash(content):
        raise InputError(f"{path}: damaged: its own SHA-256 does not match")
    if content["format_version"] > FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {content['format_version']}; this lmjax reads up to {FORMAT_VERSION}: update lmjax"
        )
    if content["step"] != step:
        raise InputError(f"{path}: of step {content['step']}, but it lies in the directory of step {step}")
    return Manifest(
        step=content["step"],
        metadata=content["metadata"],
        leaves={name: LeafEntry(tuple(leaf["shape"]), leaf["dtype"]) for name, leaf in content["leaves"].items()},
        files={name: FileEntry(**entry) for name, entry in content["files"].items()},
    )


def check_files(step_directory: epath.Path, files: Mapping[str, FileEntry], names: Iterable[str]) -> list[str]:
    """Hash ``names`` in parallel and return one line for each file that is not what ``files`` says."""
    with concurrent.futures.ThreadPoolExecutor(HASH_THREADS) as pool:
        lines = pool.map(lambda name: _check(step_directory / name, name, files[name]), names)
        return [line for line in lines if line is not None]


def unexpected_files(step_directory: epath.Path, files: Mapping[str, FileEntry]) -> list[str]:
    """One line for each file that the manifest does not know."""
    return [f"{name}: not in the manifest" for name in sorted(_file_names(step_directory)) if name not in files]


def verify(directory: epath.PathLike, step: int) -> Verdict:
    """Compare every file of ``step`` with its manifest. What is wrong is returned, not raised."""
    step_directory = as_path(directory) / str(step)
    try:
        manifest = read_manifest(directory, step)
    except InputError as error:
        return Verdict(step, 0, 0, (str(error),))
    problems = check_files(step_directory, manifest.files, manifest.files)
    problems += unexpected_files(step_directory, manifest.files)
    return Verdict(step, len(manifest.files), manifest.num_bytes, tuple(problems))


def _content_hash(content: dict[str, typing.Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_names(directory: epath.Path, prefix: str = "") -> Iterator[str]:
    for path in directory.iterdir():
        if path.name.startswith(".") or (not prefix and path.name == MANIFEST):
            continue
        if path.is_dir():
            yield from _file_names(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name


def _describe(path: epath.Path) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(size, digest.hexdigest())


def _check(path: epath.Path, name: str, expected: FileEntry) -> str | None:
    try:
        found = _describe(path)
    except FileNotFoundError:
        return f"{name}: missing"
    except store_errors() as error:
        return f"{name}: not readable: {error}"
    if found.size != expected.size:
        return f"{name}: {found.size} bytes where {expected.size} were written"
    return None if found == expected else f"{name}: damaged: its SHA-256 does not match"
