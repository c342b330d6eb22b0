"""Inspection: counts, lengths and packing as they are, and rows as text."""

import numpy as np
import pytest

from lmjax.data.inspect import inspect_dataset
from lmjax.data.plans import ensure_plan, stored_plans

pytestmark = pytest.mark.fast
BOS, EOS = 256, 257


def document(text: str) -> np.ndarray:
    return np.array([BOS, *text.encode(), EOS])


@pytest.fixture
def dataset(make_dataset):
    train = [document(text) for text in ("short", "a text of more than one row", "räts", "x" * 6)]
    return make_dataset(train=train, validation=[document("held out")], documents_per_shard=3)


def inspect(dataset, *, packing="best_fit", num_samples=0):
    return inspect_dataset(*dataset, sequence_lengths=[16, 8], packing=packing, num_samples=num_samples)


def test_counts_and_lengths(dataset):
    train, validation = inspect(dataset).splits
    assert train[:5] == ("train", None, 2, 4, 7 + 29 + 7 + 8)
    assert train.tokens_per_document == {
        "0.0": 7,
        "0.05": 7,
        "0.25": 7,
        "0.5": 7,
        "0.75": 8,
        "0.95": 29,
        "1.0": 29,
    }
    assert validation[:5] == ("validation", None, 1, 1, 10)


def test_best_fit_stands_beside_concat(dataset):
    rows = {(row.split, row.sequence_length, row.packing): row[4:] for row in inspect(dataset).packing}
    assert len(rows) == 8
    # 29 = 16 + 13; then 8 + 7 share a row, and the other 7 has its own.
    assert rows["train", 16, "best_fit"] == (4, 13, 13 / 64, 1, 1)
    assert rows["train", 16, "concat"] == (4, 13, 13 / 64, 2, 3)
    assert rows["validation", 8, "best_fit"] == (2, 6, 6 / 16, 1, 1)


def test_samples_are_rows_as_text_with_the_boundaries_of_documents(dataset):
    samples = inspect(dataset, packing="concat", num_samples=9).samples
    assert [[piece[:4] for piece in row] for row in samples] == [
        [(0, 0, 7, 7), (1, 0, 9, 29)],
        [(1, 25, 4, 29), (2, 0, 7, 7), (3, 0, 5, 8)],
    ], "the rows of several pieces, no more than there are"
    assert [[piece.text for piece in row] for row in samples] == [["short", "a text o"], ["row", "räts", "xxxx"]]
    assert inspect(dataset, packing="concat", num_samples=1).samples == samples[:1]


def test_where_no_row_has_several_pieces_any_row_is_a_sample(make_dataset):
    dataset = make_dataset(train=[document("fourteen chars")] * 3)
    samples = inspect(dataset, num_samples=2).samples
    assert [[piece[:4] for piece in row] for row in samples] == [[(0, 0, 16, 16)], [(2, 0, 16, 16)]]


def test_inspection_writes_nothing_and_finds_the_stored_plans(dataset, tmp_path):
    before = sorted((tmp_path / "dataset").iterdir())
    inspect(dataset, num_samples=1)
    assert sorted((tmp_path / "dataset").iterdir()) == before
    assert stored_plans(dataset[0]) == []
    for length, packing in ((16, "concat"), (8, "best_fit"), (16, "best_fit")):
        ensure_plan(*dataset, split="train", sequence_length=length, packing=packing)
    ensure_plan(*dataset, split="validation", sequence_length=32, packing="concat")
    assert stored_plans(dataset[0]) == [(8, "best_fit"), (16, "best_fit"), (16, "concat")]
