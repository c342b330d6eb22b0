"""The index reads back what was written, tells what is wrong with it, and identifies a dataset."""

import dataclasses
import json

import numpy as np
import pytest

from lmjax.data.index import SkippedInput, fingerprint, read_index, write_index
from lmjax.errors import InputError

pytestmark = pytest.mark.fast


@pytest.fixture
def dataset(make_dataset):
    return make_dataset(train=[np.arange(5), np.arange(9)], validation=[np.arange(3)])


def test_an_index_reads_back_to_itself(dataset, tmp_path):
    _, index = dataset
    full = dataclasses.replace(
        index,
        options={"data.ftfy": True, "data.sources": [{"kind": "stdlib"}]},
        skipped=(SkippedInput(name="a\\xff.txt", reason="not UTF-8"),),
        num_skipped=1,
    )
    write_index(tmp_path, full)
    assert read_index(tmp_path) == full
    assert read_index(str(tmp_path)) != index


def test_a_dataset_that_is_not_there_is_an_error_that_names_the_command(tmp_path):
    with pytest.raises(InputError, match="no prepared dataset here.*lmjax data prepare"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.pop("shards"), "shards"),
        (lambda tree: tree.update(token_dtype="int8"), "token_dtype"),
        (lambda tree: tree["token_counts"].pop(), "4095 token counts for a vocabulary of 4096"),
        (lambda tree: tree.update(format_version=2), "format version 2"),
        (lambda tree: tree.pop("format_version"), "not a dataset's index"),
    ],
)
def test_a_damaged_index_is_an_error_that_says_what_is_wrong(dataset, change, message):
    directory, _ = dataset
    with open(f"{directory}/index.json") as file:
        tree = json.load(file)
    change(tree)
    with open(f"{directory}/index.json", "w") as file:
        json.dump(tree, file)
    with pytest.raises(InputError, match=message):
        read_index(directory)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format_version"', b"\xff"])
def test_an_index_that_is_no_json_object_is_an_error(tmp_path, content):
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(InputError, match="not a dataset's index"):
        read_index(tmp_path)


def test_the_fingerprint_follows_tokenizer_splits_and_bytes_and_nothing_else(dataset):
    _, index = dataset
    same = dataclasses.replace(index, options={"a": 1}, inputs={"files": 3}, num_skipped=2)
    assert fingerprint(same) == fingerprint(index)
    first, *others = index.shards
    for other in (
        dataclasses.replace(index, tokenizer=dataclasses.replace(index.tokenizer, fingerprint="0")),
        dataclasses.replace(index, shards=(dataclasses.replace(first, sha256="0"), *others)),
        dataclasses.replace(index, shards=(dataclasses.replace(first, split="test"), *others)),
        dataclasses.replace(index, shards=tuple(others)),
    ):
        assert fingerprint(other) != fingerprint(index)
