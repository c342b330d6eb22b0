"""Packing: every token once, rows never over-full, little padding, and exactly the textbook rule."""

import numpy as np
import pytest

from lmjax.data import pack

pytestmark = pytest.mark.fast
PACKERS = [pack.best_fit_decreasing, pack.concat]


def tokens_covered(layout: pack.Layout, num_documents: int) -> list[list[int]]:
    """For each document, the positions that its pieces cover, in the order of the rows."""
    covered: list[list[int]] = [[] for _ in range(num_documents)]
    for document, start, length in layout.pieces.tolist():
        covered[document].extend(range(start, start + length))
    return covered


def row_lengths(layout: pack.Layout) -> np.ndarray:
    return np.add.reduceat(layout.pieces["length"], layout.row_starts[:-1])


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("sequence_length", [1, 2, 7, 64])
def test_every_token_of_every_document_lies_in_one_place(packer, sequence_length, rng):
    lengths = rng.integers(0, 150, 200)
    layout = packer(lengths, sequence_length)
    covered = tokens_covered(layout, len(lengths))
    assert [sorted(positions) for positions in covered] == [list(range(length)) for length in lengths]
    assert row_lengths(layout).max() <= sequence_length
    assert np.all(np.diff(layout.row_starts) > 0), "no row is empty"
    assert layout.num_tokens == lengths.sum()
    assert layout.padding(sequence_length) == layout.num_rows * sequence_length - lengths.sum()


def textbook_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """Room left in each row, sorted, by trying every row for every piece."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda row: rooms[row])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@pytest.mark.parametrize("capacity", [5, 32, 100])
def test_best_fit_equals_the_textbook_rule(capacity, rng):
    lengths = rng.integers(1, capacity + 1, 300)
    layout = pack.best_fit_decreasing(lengths, capacity)
    rooms = sorted((capacity - row_lengths(layout)).tolist())
    assert rooms == textbook_best_fit_decreasing(lengths.tolist(), capacity)
    assert rooms != textbook_best_fit_decreasing((lengths - lengths // 2).tolist(), capacity), "control: other lengths"


def test_best_fit_cuts_only_documents_longer_than_a_row():
    layout = pack.best_fit_decreasing(np.array([3, 25, 10, 8]), 10)
    rows = [layout.pieces[a:b].tolist() for a, b in zip(layout.row_starts[:-1], layout.row_starts[1:], strict=True)]
    assert rows == [[(0, 0, 3), (1, 20, 5)], [(1, 0, 10)], [(1, 10, 10)], [(2, 0, 10)], [(3, 0, 8)]]
    assert (layout.documents_cut, layout.lost_targets, layout.padding(10)) == (1, 2, 4)


def test_concat_cuts_one_stream():
    layout = pack.concat(np.array([3, 0, 25, 4]), 10)
    rows = [layout.pieces[a:b].tolist() for a, b in zip(layout.row_starts[:-1], layout.row_starts[1:], strict=True)]
    assert rows == [[(0, 0, 3), (2, 0, 7)], [(2, 7, 10)], [(2, 17, 8), (3, 0, 2)], [(3, 2, 2)]]
    assert (layout.documents_cut, layout.lost_targets, layout.padding(10)) == (2, 3, 8)


@pytest.mark.parametrize("sequence_length", [512, 2048])
def test_padding_is_small_on_lengths_like_those_of_web_text(sequence_length, rng):
    lengths = np.maximum(2, rng.lognormal(6.3, 1.2, 20_000)).astype(np.int64)
    layout = pack.best_fit_decreasing(lengths, sequence_length)
    stream = pack.concat(lengths, sequence_length)
    assert layout.padding(sequence_length) < 0.001 * layout.num_tokens
    assert layout.documents_cut == np.count_nonzero(lengths > sequence_length) < stream.documents_cut
    assert stream.padding(sequence_length) < sequence_length


def test_blocks_are_packed_apart(rng):
    lengths = rng.integers(1, 40, 100)
    layout = pack.best_fit_decreasing(lengths, 32, block_documents=30)
    assert [sorted(positions) for positions in tokens_covered(layout, 100)] == [list(range(n)) for n in lengths]
    blocks = layout.pieces["document"] // 30
    assert np.array_equal(blocks[layout.row_starts[:-1]], np.minimum.reduceat(blocks, layout.row_starts[:-1]))
    assert np.array_equal(blocks[layout.row_starts[:-1]], np.maximum.reduceat(blocks, layout.row_starts[:-1]))


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_to_pack_gives_no_rows(packer, lengths):
    layout = packer(np.array(lengths, np.int64), 8)
    assert (layout.num_rows, len(layout.pieces), layout.num_tokens, layout.lost_targets) == (0, 0, 0, 0)
