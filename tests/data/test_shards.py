"""Shards give back the documents that were written, in any order, and damage is found before it is read."""

import numpy as np
import pytest

from lmjax.data import shards
from lmjax.data.shards import read_documents, token_dtype, verify_shards, write_shard
from lmjax.errors import InputError

pytestmark = pytest.mark.fast


@pytest.fixture
def documents(rng):
    return [rng.integers(0, 4096, length) for length in (5, 1, 3000, 17, 2, 40, 900)]


@pytest.fixture
def dataset(make_dataset, documents):
    return make_dataset(train=documents, validation=documents[:1], documents_per_shard=3)


def test_documents_come_back_by_number_in_any_order(dataset, documents, monkeypatch):
    found = read_documents(*dataset, "train")
    assert len(found) == 7
    assert found.lengths.tolist() == [len(document) for document in documents]
    order = np.array([6, 0, 3, 3, 5, 2])
    for max_open in (256, 1):
        monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", max_open)
        for document, number in zip(found.read(order), order, strict=True):
            assert np.array_equal(document, documents[number])
    assert np.array_equal(found[1], documents[1])
    assert found.read(np.array([], np.int64)) == []


def test_a_split_without_shards_is_empty(dataset):
    found = read_documents(*dataset, "test")
    assert len(found) == 0
    assert found.lengths.tolist() == []


@pytest.mark.parametrize(("vocab_size", "dtype"), [(259, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")])
def test_the_dtype_is_the_smallest_that_holds_every_token(tmp_path, vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype
    last = np.array([vocab_size - 1, 0])
    assert last.astype(dtype).tolist() == last.tolist()


def test_the_same_documents_give_the_same_bytes(tmp_path, documents):
    first = write_shard(tmp_path / "a", documents, "uint32")
    assert first == write_shard(tmp_path / "b", iter(documents), "uint32")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert first[:2] == (7, sum(map(len, documents)))
    assert first != write_shard(tmp_path / "c", documents[::-1], "uint32")


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    if how == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes({"flipped": content, "truncated": content[: len(content) // 2], "empty": b""}[how])


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "missing"])
def test_every_damage_is_found_by_verification_and_named(dataset, tmp_path, how):
    directory, index = dataset
    verify_shards(directory, index, "train")
    damage(tmp_path / "dataset" / "train-00001-of-00003.arrayrecord", how)
    with pytest.raises(InputError, match=r"train-00001-of-00003\.arrayrecord: (the shard is missing|damaged).*prepare"):
        verify_shards(directory, index, "train")
    verify_shards(directory, index, "validation")


@pytest.mark.parametrize("how", ["truncated", "empty", "missing"])
def test_reading_a_shard_that_is_not_whole_is_an_input_error(dataset, tmp_path, how):
    damage(tmp_path / "dataset" / "train-00001-of-00003.arrayrecord", how)
    found = read_documents(*dataset, "train")
    assert len(found[0]) == 5
    for read in (lambda: found.read(np.array([0, 4])), lambda: found.lengths):
        with pytest.raises(InputError, match=r"train-00001-of-00003\.arrayrecord: (the shard is missing|damaged)"):
            read()


def test_a_full_disk_is_an_input_error_and_leaves_no_file(tmp_path, rng, file_size_limit):
    documents = [rng.integers(0, 65536, 5000) for _ in range(40)]
    with file_size_limit(100_000), pytest.raises(InputError, match="File too large.*limit on file sizes"):
        write_shard(tmp_path / "a", documents, "uint16")
    assert list(tmp_path.iterdir()) == []
    write_shard(tmp_path / "a", documents, "uint16")


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="Not a directory"):
        write_shard(tmp_path / "file" / "a", [np.arange(3)], "uint16")
