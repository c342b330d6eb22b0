"""Datasets in an object store: read through a copy on this machine whose shards were verified, and published whole.

Batches need random access to every shard, so each machine keeps a copy of them in its cache (``lmjax.paths``), by the
SHA-256 that the index has. A shard is downloaded once a machine, whatever the number of processes, runs and datasets
that have it; what is there is hashed when a run opens the dataset, and fetched anew where it is damaged.
"""

import concurrent.futures
import hashlib
import secrets
from pathlib import Path

from etils import epath

from lmjax import paths
from lmjax.data.index import INDEX_FILE, read_index
from lmjax.data.shards import verify_shards
from lmjax.errors import InputError

THREADS = 8


def local_dataset(directory: str, *, shards: bool = True, trusted: bool = False) -> str:
    """The dataset as a directory on this machine: ``directory`` itself, or for one in a store its copy in the cache.

    Without ``shards`` it has the index and the tokenizer alone. ``trusted`` leaves out hashing the shards that are in
    the cache already, for processes after the first one of a machine. Pack plans are built in the copy. Raises
    InputError where there is no dataset, where a shard in the store is not the one of the index, and where the store
    cannot be reached.
    """
    if not paths.is_remote(directory):
        return directory
    remote = paths.as_path(directory)
    content = _read_index(remote)
    local = paths.cache_root() / "datasets" / hashlib.sha256(content).hexdigest()
    with paths.locked("datasets"):
        _put(local / INDEX_FILE, content)
        index = read_index(local)
        _put(local / _plain(index.tokenizer.file, remote), _read(remote / index.tokenizer.file))
    if shards:

        def link(file: str, sha256: str) -> None:
            entry = paths.fetch(remote / _plain(file, remote), sha256, trusted=trusted)
            _link(local / file, entry)

        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(link, *zip(*((shard.file, shard.sha256) for shard in index.shards), strict=True)):
                pass
    return str(local)


def publish_dataset(local: str, directory: str) -> None:
    """Copy a prepared dataset into a store, verified, its index last: with the index it is whole, before it is not one.

    Raises InputError where another dataset is there, and where a shard is damaged.
    """
    index, remote = read_index(local), paths.as_path(directory)
    content = (Path(local) / INDEX_FILE).read_bytes()
    with paths.reaching(remote):
        there = (remote / INDEX_FILE).read_bytes() if (remote / INDEX_FILE).exists() else None
    if there == content:
        return
    if there is not None:
        raise InputError(f"{directory}: another dataset is there; choose another data.path, or remove it first")
    for split in dict.fromkeys(shard.split for shard in index.shards):
        verify_shards(local, index, split)
    names = [index.tokenizer.file, *(shard.file for shard in index.shards)]
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda name: paths.upload(Path(local) / name, remote / name), names):
            pass
    paths.write_object(remote / INDEX_FILE, content)


def _read_index(remote: epath.Path) -> bytes:
    with paths.reaching(remote):
        try:
            return (remote / INDEX_FILE).read_bytes()
        except FileNotFoundError:
            raise InputError(
                f"{remote}: no prepared dataset here (no {INDEX_FILE}); make it with `lmjax data prepare`"
            ) from None


def _read(source: epath.Path) -> bytes:
    with paths.reaching(source):
        try:
            return source.read_bytes()
        except FileNotFoundError:
            raise InputError(f"{source}: missing in the object store; publish the dataset anew") from None


def _plain(file: str, remote: epath.Path) -> str:
    """A file's name, which must not lead out of the directory."""
    if Path(file).name != file:
        raise InputError(f"{remote / INDEX_FILE}: found the file {file!r}; files lie in the directory of the dataset")
    return file


def _put(path: Path, content: bytes) -> None:
    """Make a file of the cache hold ``content``, in one step; it is read again by every run, so it is not trusted."""
    if path.is_file() and path.read_bytes() == content:
        return
    with paths.using_cache():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        unfinished.write_bytes(content)
        unfinished.replace(path)


def _link(path: Path, entry: Path) -> None:
    """Make ``path`` a link to a file of the cache, in one step."""
    if path.is_symlink() and path.readlink() == entry:
        return
    with paths.using_cache():
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        unfinished.symlink_to(entry)
        unfinished.replace(path)
