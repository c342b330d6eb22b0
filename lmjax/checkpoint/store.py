"""Checkpoints in an object store: written to this machine's disk, uploaded, and vouched for by the manifest, last.

Orbax commits a checkpoint by renaming a directory, which a store cannot do, and does not write to ``s3://`` at all. So
every process lets Orbax write its own part of each array on its own disk, uploads these files, and hands their hashes
to process 0 over the key-value store of ``jax.distributed``. Process 0 writes the manifest when it has all of them, in
one request: a kill at any moment before leaves no manifest, hence no checkpoint. No disk is shared, nothing is read
back to be hashed, and one way serves every kind of store.

To restore, every process fetches the files of the manifest through the cache of its machine, which verifies each one
and downloads it once a machine. Orbax merges the parts of several processes into one index when all of them have
written; here the reader does, on its disk, since no writer has all parts. A machine needs disk for its part while it
saves, and for the whole checkpoint (or the part of it that is asked for) while it restores.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import json
import os
import re
import secrets
import shutil
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from lmjax import paths
from lmjax.checkpoint.manifest import HASH_THREADS, MANIFEST, UPLOADING, FileEntry, is_unfinished
from lmjax.compat import coordination_client
from lmjax.errors import InputError

TIMEOUT_MS = 30 * 60 * 1000  # the slowest process may upload for minutes after the fastest
PROCESS = re.compile(r"process_(\d+)")
MERGED = ("manifest.ocdbt", "d")
DIRECTORIES_FIRST = ocp.options.AsyncOptions(create_directories_asynchronously=False)
"""In the background, Orbax makes the parts' directories when a key in the store of ``jax.distributed`` says that the
step's is there. Its name is the same for all processes: on another's word, a part's came first, and the save failed."""


def staging_directory(directory: epath.Path) -> epath.Path:
    """Where this process writes a checkpoint before it is uploaded; empty when this returns."""
    staging = paths.working_directory(str(directory)) / f"staging-{jax.process_index()}"
    with paths.using_cache():
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    return epath.Path(staging)


def check_writable(directory: epath.Path) -> None:
    """Raise InputError now, and not at the first save, where the store takes nothing."""
    probe = directory / ".writable"
    paths.write_object(probe, b"")
    with paths.reaching(directory):
        probe.unlink()


def unfinished(directory: epath.Path) -> list[epath.Path]:
    """The steps whose upload was stopped."""
    with paths.reaching(directory):
        found = list(directory.iterdir()) if directory.exists() else []
        return [path for path in found if path.name.isdecimal() and is_unfinished(path)]


def begin_upload(step_directory: epath.Path) -> None:
    """Mark a step as not there yet. Process 0 calls it before any process uploads."""
    paths.write_object(step_directory / UPLOADING, b"")


def end_upload(step_directory: epath.Path) -> None:
    """Remove the mark; the manifest is there."""
    with paths.reaching(step_directory):
        (step_directory / UPLOADING).unlink()


def remove_step(step_directory: epath.Path) -> None:
    """Remove a step so that a kill in between leaves an upload that did not end, never half a checkpoint."""
    begin_upload(step_directory)
    with paths.reaching(step_directory):
        (step_directory / MANIFEST).unlink(missing_ok=True)
        for path in step_directory.iterdir():
            if path.name != UPLOADING:
                path.rmtree() if path.is_dir() else path.unlink()
        (step_directory / UPLOADING).unlink()


def upload_part(staged: epath.Path, step_directory: epath.Path) -> dict[str, FileEntry]:
    """Upload what this process wrote, in parallel, and return size and hash of each file, by its name in the step."""
    root = Path(staged)
    names = sorted(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())
    names = [name for name in names if _is_ours(name)]

    def send(name: str) -> FileEntry:
        entry = FileEntry((root / name).stat().st_size, paths.sha256_of(root / name))
        paths.upload(root / name, step_directory / name)
        return entry

    with concurrent.futures.ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(names, pool.map(send, names), strict=True))


def _is_ours(name: str) -> bool:
    """Whether this process uploads a file: what bears its number, and on process 0 what bears none.

    With several processes, the index that Orbax merged on this disk has this process's part only.
    """
    numbered = PROCESS.search(name)
    if numbered:
        return int(numbered[1]) == jax.process_index()
    merged = name.count("/") >= 1 and name.split("/")[1] in MERGED
    return jax.process_index() == 0 and not (merged and jax.process_count() > 1)


def tell(key: str, files: Mapping[str, FileEntry] | None) -> None:
    """Tell process 0 which files this process has uploaded; None where it failed. It waits for nobody.

    Unlike what is in ``processes``, this and ``collect`` may be called beside the main thread.
    """
    if jax.process_count() > 1:
        said = None if files is None else {name: dataclasses.asdict(entry) for name, entry in files.items()}
        _client().key_value_set(f"lmjax/upload/{key}/{jax.process_index()}", json.dumps(said))


def collect(key: str, ours: dict[str, FileEntry]) -> dict[str, FileEntry]:
    """On process 0, the files of all processes as soon as all have told. Raises InputError where one of them failed."""
    if jax.process_count() == 1 or jax.process_index() > 0:
        return ours
    files: dict[str, FileEntry] = {}
    for process in range(jax.process_count()):
        theirs = json.loads(_client().blocking_key_value_get(f"lmjax/upload/{key}/{process}", TIMEOUT_MS))
        if theirs is None:
            raise InputError(f"process {process} has not written its part")
        files |= {name: FileEntry(**entry) for name, entry in theirs.items()}
    _client().key_value_delete(f"lmjax/upload/{key}/")
    return dict(sorted(files.items()))


def _client() -> typing.Any:
    client = coordination_client()
    assert client is not None, "several processes without jax.distributed"
    return client


def fetch_files(step_directory: epath.Path, files: Mapping[str, FileEntry], names: Iterable[str]) -> list[str]:
    """Bring ``names`` into the cache of this machine, in parallel; one line for each that is missing or damaged."""

    def fetch(name: str) -> str | None:
        try:
            paths.fetch(step_directory / name, files[name].sha256)
        except InputError as error:
            return f"{name}: {error}"
        return None

    with concurrent.futures.ThreadPoolExecutor(HASH_THREADS) as pool:
        return [line for line in pool.map(fetch, names) if line is not None]


@contextlib.contextmanager
def fetched(files: Mapping[str, FileEntry], names: Iterable[str]) -> Iterator[epath.Path]:
    """A directory with the files that were fetched, as Orbax reads it; gone at the end, and with it the cached bytes.

    They are links to the files of the cache, so that another process may drop its own in the meantime.
    """
    names = list(names)
    with _links() as directory:
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            with paths.using_cache():
                os.link(paths.cache_entry(files[name].sha256), directory / name)
        for part in sorted(path for path in directory.iterdir() if path.is_dir()):
            if not (part / MERGED[0]).exists():
                asyncio.run(_merge(epath.Path(part)))
        yield epath.Path(directory)
        drop_files(files, names)


def drop_files(files: Mapping[str, FileEntry], names: Iterable[str]) -> None:
    """Remove ``names`` from the cache of this machine: a checkpoint is read once, and may be most of a disk."""
    for name in names:
        paths.cache_entry(files[name].sha256).unlink(missing_ok=True)


async def _merge(part: epath.Path) -> None:
    context = ts.Context({"cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}})
    await ocp.type_handlers.merge_ocdbt_per_process_files(part, context, use_zarr3=False)


@contextlib.contextmanager
def _links() -> Iterator[Path]:
    """An empty directory in the cache, removed at the end; those that killed processes left are removed first."""
    parent = paths.cache_root() / "restoring"
    with paths.locked("restoring"), paths.using_cache():
        parent.mkdir(parents=True, exist_ok=True)
        for left in parent.iterdir():
            if (descriptor := _claim(left)) is not None:
                shutil.rmtree(left)
                os.close(descriptor)
        directory = parent / secrets.token_hex(8)
        directory.mkdir()
        claim = _claim(directory)
    assert claim is not None
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(claim)


def _claim(directory: Path) -> int | None:
    """A lock on the directory that lasts until it is closed, or None where a process that lives has it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def multiprocessing_options() -> ocp.options.MultiprocessingOptions:
    """Options with which Orbax works on the disk of this process and waits for no other."""
    process = jax.process_index()
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process_{process}"
    )


def writer(parts: Iterable[str]) -> ocp.AsyncCheckpointer:
    """What writes these parts of a state on the disk of this process.

    The handlers have a registry of their own: that of the package remembers one primary process for all.
    """
    options = multiprocessing_options()

    def handler() -> ocp.PyTreeCheckpointHandler:
        arrays = ocp.type_handlers.ArrayHandler(primary_host=options.primary_host, array_metadata_store=None)
        registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
        part = ocp.BasePyTreeCheckpointHandler(
            multiprocessing_options=options,
            type_handler_registry=registry,
            enable_post_merge_validation=jax.process_count() == 1,  # what others write is not here
        )
        return ocp.PyTreeCheckpointHandler(
            multiprocessing_options=options, type_handler_registry=registry, handler_impl=part
        )

    handlers: dict[str, typing.Any] = {part: handler() for part in parts}
    composite = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(multiprocessing_options=options, async_options=DIRECTORIES_FIRST),
        **handlers,
    )
    return ocp.AsyncCheckpointer(composite, multiprocessing_options=options, async_options=DIRECTORIES_FIRST)
