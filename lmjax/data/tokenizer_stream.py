"""Text of tokens that come one at a time."""

from collections.abc import Sequence
from typing import Protocol


class Decodes(Protocol):
    """What of a tokenizer is needed here."""

    held_ids: frozenset[int]
    """Tokens whose text may change with those after them."""

    def decode(self, ids: Sequence[int]) -> str: ...


class IncrementalDecoder:
    """Gives out the text of tokens as far as it cannot change any more: never a part of a character.

    All pieces and then ``flush`` are together ``decode([*prompt, *ids])`` without the text of the prompt. Only the
    last few tokens are decoded again for a new one, however long the text grows.
    """

    def __init__(self, tokenizer: Decodes, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._shown = tokenizer.decode(self._ids)
        self._new = len(self._ids)
        """Where in ``_ids`` the tokens begin whose text was not given out; ``_shown`` is the text of those before."""
        self._held = 0
        """Where in ``_ids`` the last of the tokens ends that are held; 0 for none."""

    def push(self, token: int) -> str:
        """The text that is settled with this token; often its own, or none."""
        self._ids.append(token)
        if token in self._tokenizer.held_ids:
            self._held = len(self._ids)
            return ""
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):  # perhaps the first bytes of a character
            return ""
        if self._held and text == self._tokenizer.decode(self._ids[: self._held]):  # a token without text ends no run
            return ""
        piece = text[len(self._shown) :]
        # The tokens of this piece are context enough for the next ones, if they have a text: before the first text a
        # decoder may leave out a space.
        context = self._ids[self._new :]
        alone = self._tokenizer.decode(context) if piece else ""
        if alone:
            self._ids, self._shown = context, alone
        else:
            self._shown = text
        self._new, self._held = len(self._ids), 0
        return piece

    def flush(self) -> str:
        """The rest, when no more tokens come: bytes that never became a character are U+FFFD."""
        rest = self._tokenizer.decode(self._ids)[len(self._shown) :]
        self._shown += rest
        self._new = len(self._ids)
        return rest


def incremental_decoder(tokenizer: Decodes, prompt: Sequence[int] = ()) -> IncrementalDecoder:
    """A decoder for the tokens that follow ``prompt``."""
    return IncrementalDecoder(tokenizer, prompt)
