"""Laying documents into rows of one length: pure functions of the documents' lengths, the same on every machine."""

from typing import NamedTuple

import numpy as np

PIECE = np.dtype([("document", "<i8"), ("start", "<i4"), ("length", "<i4")])
"""A run of one document's tokens: ``document[start : start + length]``."""

BLOCK_DOCUMENTS = 1 << 20
"""Best-fit packs this many documents at a time: memory is bounded, and only a block's last rows have more padding."""


class Layout(NamedTuple):
    """Rows of pieces: row ``r`` is ``pieces[row_starts[r] : row_starts[r + 1]]``, side by side from its start."""

    pieces: np.ndarray
    """PIECE [num_pieces]."""
    row_starts: np.ndarray
    """int64 [num_rows + 1]."""

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.pieces["length"].sum(dtype=np.int64))

    @property
    def lost_targets(self) -> int:
        """Cuts inside documents: the last token before each has no target in its row."""
        return int(np.count_nonzero(self.pieces["start"]))

    @property
    def documents_cut(self) -> int:
        """Documents that lie in more than one piece."""
        return len(np.unique(self.pieces["document"][self.pieces["start"] > 0]))

    def padding(self, sequence_length: int) -> int:
        """Positions of the rows that hold no token."""
        return self.num_rows * sequence_length - self.num_tokens


def best_fit_decreasing(lengths: np.ndarray, sequence_length: int, block_documents: int = BLOCK_DOCUMENTS) -> Layout:
    """Documents whole wherever they fit, each in the fullest row that still has room, longest first.

    A document longer than a row is cut into full rows and a rest, which is packed like a document ("Fewer Truncations
    Improve Language Modeling", arXiv 2404.10830). Within a row, pieces stand in the order of the documents, and rows in
    the order of their first piece. Empty documents have no piece. ``lengths``: tokens, int [num_documents].
    """
    assert sequence_length > 0
    assert block_documents > 0
    blocks = [
        _pack_block(_cut_to_rows(lengths[first : first + block_documents], sequence_length, first), sequence_length)
        for first in range(0, len(lengths), block_documents)
    ]
    if not blocks:
        return Layout(np.empty(0, PIECE), np.zeros(1, np.int64))
    pieces_per_row = np.concatenate([np.diff(block.row_starts) for block in blocks])
    return Layout(np.concatenate([block.pieces for block in blocks]), _starts(pieces_per_row))


def concat(lengths: np.ndarray, sequence_length: int) -> Layout:
    """All documents as one stream, cut every ``sequence_length`` tokens: no padding but at the end, documents cut."""
    assert sequence_length > 0
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    row_edges = np.arange(0, total, sequence_length, dtype=np.int64)
    begins = np.union1d(row_edges, ends)
    begins = begins[begins < total]
    pieces = np.empty(len(begins), PIECE)
    pieces["document"] = np.searchsorted(ends, begins, side="right")
    pieces["start"] = begins - (ends - lengths)[pieces["document"]]
    pieces["length"] = np.diff(np.append(begins, total))
    return Layout(pieces, np.append(np.searchsorted(begins, row_edges), len(begins)).astype(np.int64))


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _cut_to_rows(lengths: np.ndarray, sequence_length: int, first_document: int) -> np.ndarray:
    counts = -(-lengths.astype(np.int64) // sequence_length)
    pieces = np.empty(int(counts.sum()), PIECE)
    document = np.repeat(np.arange(len(lengths)), counts)
    start = (np.arange(len(pieces)) - _starts(counts)[document]) * sequence_length
    pieces["document"] = document + first_document
    pieces["start"] = start
    pieces["length"] = np.minimum(lengths[document] - start, sequence_length)
    return pieces


def _pack_block(pieces: np.ndarray, sequence_length: int) -> Layout:
    rows = _best_fit(pieces["length"], sequence_length)
    # Pieces come in document order and the sort is stable, so that order holds within each row.
    order = np.argsort(rows, kind="stable")
    pieces, counts = pieces[order], np.bincount(rows)
    starts = _starts(counts)
    row_order = np.argsort(order[starts[:-1]])
    moved = np.repeat(starts[row_order] - _starts(counts[row_order])[:-1], counts[row_order])
    return Layout(pieces[np.arange(len(pieces)) + moved], _starts(counts[row_order]))


def _best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Row of each piece, int64 [num_pieces], by best-fit decreasing.

    Pieces of one length are placed together. The tightest row that holds one stays the tightest afterwards, so it takes
    as many of them as fit: time grows with the pieces, not with pieces times rows.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    rows_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where rows_by_room[r] is not empty
    num_rows = 0
    placed: list[int] = []  # the row of each piece, in the order of placing
    for length, left in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
            else:
                room = capacity
                num_new = -(-left // (capacity // length))
                rows_by_room[room].extend(range(num_rows + num_new - 1, num_rows - 1, -1))
                num_rows += num_new
                rooms |= 1 << room
            rows = rows_by_room[room]
            each = min(room // length, left)
            taken = rows[-min(len(rows), left // each) :]
            del rows[-len(taken) :]
            if not rows:
                rooms ^= 1 << room
            for row in taken:
                placed += [row] * each
            left -= each * len(taken)
            remaining = room - each * length
            if remaining:
                rows_by_room[remaining].extend(taken)
                rooms |= 1 << remaining
    result = np.empty(len(lengths), np.int64)
    result[order] = placed
    return result
