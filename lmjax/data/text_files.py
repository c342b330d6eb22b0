"""A text file as documents: one, or several of bounded size where it is long."""

from collections.abc import Iterator
from typing import BinaryIO

DOCUMENT_BYTES = 4 * 2**20
"""A text file that is longer is cut, at ends of lines, into documents of about this size: memory stays bounded."""
LINE_SEARCH_BYTES = 2**16
"""How far the end of a line is looked for; after that a text file is cut between two characters."""


def read_document(stream: BinaryIO, start: int, stop: int, size: int) -> tuple[int, bytes]:
    """The document that starts between two bytes of a file of ``size``: where it starts, and its bytes."""
    first, end = (_line_start(stream, offset, size) for offset in (start, stop))
    stream.seek(first)
    return first, stream.read(end - first)


def stream_documents(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The documents of a file that can be read in one direction only: those of ``read_document`` for its parts of
    ``DOCUMENT_BYTES``."""
    held = b""  # from byte ``base`` on
    base = start = limit = 0
    ended = False
    while True:
        limit += DOCUMENT_BYTES
        held = held[min(start, limit - 1) - base :]
        base = min(start, limit - 1)
        while not ended and base + len(held) < limit + LINE_SEARCH_BYTES:
            more = stream.read(limit + LINE_SEARCH_BYTES - base - len(held))
            held += more
            ended = not more
        if ended and limit >= base + len(held):
            yield start, held[start - base :]
            return
        before = limit - 1 - base
        end = _line_start_in(held[before : before + LINE_SEARCH_BYTES], limit, base + len(held))
        yield start, held[start - base : end - base]
        start = end


def _line_start(stream: BinaryIO, offset: int, size: int) -> int:
    """The first place from ``offset`` on at which a line starts, or else a character; 0 and ``size`` stay."""
    if not 0 < offset < size:
        return offset
    stream.seek(offset - 1)
    return _line_start_in(stream.read(LINE_SEARCH_BYTES), offset, size)


def _line_start_in(window: bytes, offset: int, size: int) -> int:
    """``window`` has the bytes from ``offset`` - 1 on."""
    end = window.find(b"\n")
    if end >= 0:
        return offset + end
    if offset - 1 + len(window) >= size:
        return size
    # Bytes 10xxxxxx go on with a character; there are at most three in a row.
    following = window[1:4]
    return offset + next((more for more, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))
