"""Merging: the first of equal documents stays, shards are cut by size, and what was written is not written again."""

import numpy as np
import pytest

from lmjax.data import merge
from lmjax.data.merge import make_shard, select
from lmjax.data.parts import Volume, digest_of, read_splits
from lmjax.data.shards import Documents

pytestmark = pytest.mark.fast


@pytest.fixture
def make_parts(tmp_path):
    """Parts of training documents, each a word like ``a3``: three tokens, all of them the number of the letter a."""

    def make(*parts: str) -> list[Volume]:
        jobs = []
        for number, words in enumerate(parts):
            tokens = [np.full(int(word[1:]), ord(word[0]), np.uint16) for word in words.split()]
            arrays = {
                "train_digests": np.frombuffer(b"".join(map(digest_of, words.split())), np.uint8).reshape(-1, 16),
                "train_lengths": np.array([len(document) for document in tokens], np.int64),
                "train_tokens": np.concatenate([np.empty(0, np.uint16), *tokens]),
            }
            empty = {f"validation_{name[6:]}": array[:0] for name, array in arrays.items()}
            path = tmp_path / f"part-{number}.npz"
            np.savez(path, **arrays, **empty)
            jobs.append(Volume(str(path), words, read_splits(str(path))))
        return jobs

    return make


def merged(parts, directory, shard_bytes=1 << 20):
    """The documents of each shard, as words, and how many duplicates there were."""
    selection = select(parts, directory=directory, shard_bytes=shard_bytes, dtype="uint16", vocab_size=128)
    shards = [make_shard(job) for job in selection.jobs]
    words = []
    for shard, lengths in zip(shards, selection.lengths, strict=True):
        found = Documents(directory, [shard.entry], "uint16")
        assert sum(found.lengths) == shard.entry.tokens
        assert lengths.tolist() == found.lengths.tolist()
        words.append([f"{chr(found[number][0])}{found.lengths[number]}" for number in range(len(found))])
    return words, selection.duplicates, sum(shard.token_counts for shard in shards)


def test_the_first_of_equal_documents_stays(make_parts, tmp_path):
    parts = make_parts("a3 b2 a3", "", "c1 b2 a3 a2", "b2")
    words, duplicates, _ = merged(parts, tmp_path)
    assert words == [["a3", "b2", "c1", "a2"]]
    assert duplicates == 4


def test_a_target_is_every_token_but_a_documents_first(make_parts, tmp_path):
    _, _, counts = merged(make_parts("a3 b2 a3", "c1 d4 b2"), tmp_path)
    assert {chr(token): int(counts[token]) for token in np.flatnonzero(counts)} == {"a": 2, "b": 1, "d": 3}


def test_shards_are_cut_by_size_and_keep_the_order(make_parts, tmp_path):
    parts = make_parts("a4 b4 c4", "d1 e9 f1", "g2")
    for shard_bytes, expected in (
        (1 << 20, [["a4", "b4", "c4", "d1", "e9", "f1", "g2"]]),
        (16, [["a4", "b4"], ["c4", "d1", "e9"], ["f1", "g2"]]),
        (2, [["a4"], ["b4"], ["c4"], ["d1"], ["e9"], ["f1"], ["g2"]]),
    ):
        words, _, counts = merged(parts, tmp_path, shard_bytes)
        assert words == expected
        assert counts.sum() == 25 - 7


def test_a_small_dataset_has_several_shards_for_several_processes(make_parts, tmp_path, monkeypatch):
    parts = make_parts("a4 b4 c4", "d1 e9 f1", "g2")
    monkeypatch.setattr(merge, "MIN_SHARD_BYTES", 16)
    assert merged(parts, tmp_path)[0] == [["a4", "b4"], ["c4", "d1", "e9"], ["f1", "g2"]]
    assert merged(parts, tmp_path, 2)[0][:2] == [["a4"], ["b4"]], "never more than was asked for"
    monkeypatch.setattr(merge, "MIN_SHARD_BYTES", 2)
    monkeypatch.setattr(merge, "SHARDS", 2)
    assert len(merged(parts, tmp_path)[0]) == 2


def test_a_shard_that_is_there_is_not_written_again_unless_it_has_other_documents(make_parts, tmp_path, monkeypatch):
    written = []
    write_shard = merge.write_shard
    monkeypatch.setattr(merge, "write_shard", lambda path, *rest: written.append(path.name) or write_shard(path, *rest))
    first = merged(make_parts("a4 b4 c4", "d1"), tmp_path, 8)
    assert len(written) == 4
    again = merged(make_parts("a4 b4 c4", "d1"), tmp_path, 8)
    assert len(written) == 4
    assert again[:2] == first[:2]
    assert np.array_equal(again[2], first[2])
    merged(make_parts("a4 b4 c4", "e1"), tmp_path, 8)
    assert written[4:] == ["train-00003-of-00004.arrayrecord"]
