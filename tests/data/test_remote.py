"""Datasets in an object store: published whole, fetched once a machine, verified, and fetched anew where damaged."""

import concurrent.futures
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from lmjax import paths
from lmjax.data.index import INDEX_FILE, fingerprint, read_index
from lmjax.data.remote import local_dataset, publish_dataset
from lmjax.data.shards import read_documents, verify_shards
from lmjax.data.tokenizer import load_tokenizer
from lmjax.errors import InputError

DOCUMENTS = [np.arange(number, number + 20) for number in range(10)]


@pytest.fixture
def published(make_dataset, bucket):
    """A dataset on this disk, and where it was published."""
    local, index = make_dataset(train=DOCUMENTS, validation=DOCUMENTS[:2], documents_per_shard=4)
    publish_dataset(local, f"{bucket}/data")
    return local, index, f"{bucket}/data"


@pytest.fixture
def downloads(monkeypatch):
    """The objects that were downloaded."""
    sources = []
    download = paths.download

    def recorded(source: epath.Path, target: Path) -> str:
        sources.append(source.name)
        return download(source, target)

    monkeypatch.setattr(paths, "download", recorded)
    return sources


def test_a_path_on_a_disk_stays_as_it_is():
    assert local_dataset("some/where") == "some/where"


def test_the_same_documents_come_back_and_each_shard_is_downloaded_once(published, downloads):
    _, index, remote = published
    with concurrent.futures.ThreadPoolExecutor(3) as pool:  # as three processes of one machine
        places = set(pool.map(local_dataset, [remote] * 3))
    assert len(places) == 1
    local = places.pop()
    assert fingerprint(read_index(local)) == fingerprint(index)
    assert load_tokenizer(local).fingerprint == index.tokenizer.fingerprint
    found = read_documents(local, index, "train")
    assert [found[number].tolist() for number in range(len(found))] == [document.tolist() for document in DOCUMENTS]
    assert sorted(downloads) == sorted(shard.file for shard in index.shards)
    local_dataset(remote)
    assert len(downloads) == len(index.shards)


def test_a_damaged_file_of_the_cache_is_fetched_anew(published, downloads):
    _, index, remote = published
    local = local_dataset(remote)
    downloads.clear()
    victim = index.shards[1]
    entry = paths.cache_entry(victim.sha256)
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(bytes(content))
    local_dataset(remote, trusted=True)
    with pytest.raises(InputError, match="damaged shard"):
        verify_shards(local, index, victim.split)
    assert downloads == []
    assert local_dataset(remote) == local
    assert downloads == [victim.file]
    verify_shards(local, index, victim.split)


def test_a_damaged_index_or_tokenizer_of_the_cache_is_fetched_anew(published):
    local, index, remote = published
    copy = Path(local_dataset(remote, shards=False))
    for name in (INDEX_FILE, index.tokenizer.file):
        (copy / name).write_bytes(b"{}")
    assert local_dataset(remote, shards=False) == str(copy)
    for name in (INDEX_FILE, index.tokenizer.file):
        assert (copy / name).read_bytes() == (Path(local) / name).read_bytes()


def test_the_index_alone_fetches_no_shard(published, downloads):
    local_dataset(published[2], shards=False)
    assert downloads == []


def test_a_damaged_or_missing_shard_in_the_store_is_refused(published):
    _, index, remote = published
    victim = epath.Path(remote) / index.shards[0].file
    content = victim.read_bytes()
    victim.write_bytes(content[:-1])
    with pytest.raises(InputError, match=rf"{victim}: damaged"):
        local_dataset(remote)
    assert not paths.cache_entry(index.shards[0].sha256).exists()
    victim.unlink()
    with pytest.raises(InputError, match=rf"{victim}: missing"):
        local_dataset(remote)
    victim.write_bytes(content)
    local_dataset(remote)


def test_there_is_no_dataset_before_the_index(make_dataset, bucket, monkeypatch):
    local, _ = make_dataset(train=DOCUMENTS)

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(paths, "write_object", kill)
        with pytest.raises(Killed):
            publish_dataset(local, f"{bucket}/data")
    with pytest.raises(InputError, match="no prepared dataset here"):
        local_dataset(f"{bucket}/data")
    publish_dataset(local, f"{bucket}/data")
    local_dataset(f"{bucket}/data")


def test_another_dataset_is_never_written_over(make_dataset, published):
    local, _ = make_dataset(name="other", train=DOCUMENTS[:3])
    with pytest.raises(InputError, match="another dataset is there"):
        publish_dataset(local, published[2])
    publish_dataset(published[0], published[2])
