"""The text of one row as it grows, which ends before a stop string."""

from collections.abc import Sequence
from typing import Protocol


class TokenDecoder(Protocol):
    """Text of tokens that come one at a time, never a part of a character: ``data.tokenizer_stream`` has one."""

    def push(self, token: int) -> str:
        """The text that is settled with this token."""
        ...

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        ...


class TextStream:
    """The text of new tokens in pieces that are never taken back: what may yet become a stop string is held."""

    def __init__(self, decoder: TokenDecoder, stop: Sequence[str] = ()):
        self._decoder, self._stop = decoder, stop
        self._given = 0
        self.text = ""
        """What is decoded so far; without a stop string and what follows it."""
        self.stopped = False
        """Whether a stop string has ended the text."""

    def feed(self, token: int) -> str:
        """The text that is sure now."""
        assert not self.stopped
        return self._add(self._decoder.push(token))

    def finish(self) -> str:
        """The rest, after the last token; nothing if it was asked for before."""
        piece = "" if self.stopped else self._add(self._decoder.flush())
        return piece + self._give(len(self.text))

    def _add(self, new: str) -> str:
        unsearched = len(self.text)
        self.text += new
        found = []
        for stop in self._stop:
            start = self.text.find(stop, max(0, unsearched - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start))
        if found:  # the one that was complete first; of several, the one that began first
            self.text, self.stopped = self.text[: min(found)[1]], True
            return self._give(len(self.text))
        held = max((self._overlap(stop) for stop in self._stop), default=0)
        return self._give(len(self.text) - held)

    def _overlap(self, stop: str) -> int:
        """Characters at the end of the text that ``stop`` begins with."""
        longest = min(len(stop) - 1, len(self.text))
        return next((size for size in range(longest, 0, -1) if self.text.endswith(stop[:size])), 0)

    def _give(self, end: int) -> str:
        piece = self.text[self._given : end]
        self._given = max(self._given, end)
        return piece
