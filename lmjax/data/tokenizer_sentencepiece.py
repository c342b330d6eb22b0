"""SentencePiece models, used so that they encode any text without loss where they can."""

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from lmjax.data.files import write_bytes
from lmjax.errors import InputError

SENTENCEPIECE_FILE = "tokenizer.model"
SPACE_MARK = "\u2581"
"""What SentencePiece writes for a space in its pieces; in a text it would come back as a space."""
SEGMENT_CHARACTERS = 1 << 14
"""Longer texts are encoded in parts where that changes nothing: the encoder's memory grows with the part."""
_RUN_OF_SPACES = re.compile("(?<! ) ")


class SentencePieceTokenizer:
    """A SentencePiece model, BPE or unigram. ``model`` is the content of its file; ``source`` names that in errors."""

    kind = "sentencepiece"
    file = SENTENCEPIECE_FILE
    chat_template: str | None = None
    held_ids: frozenset[int] = frozenset()

    def __init__(self, model: bytes, source: str):
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            # An empty file loads as an empty model.
            loaded = bool(model) and self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            loaded = False
        if not loaded or not self._processor.get_piece_size():
            raise InputError(
                f"{source}: not a SentencePiece model, or a damaged one ({len(model)} bytes); copy it anew or train "
                "one with `lmjax tokenizer train`"
            )
        self.vocab_size: int = self._processor.get_piece_size()
        self.bos_id = _present(self._processor.bos_id())
        self.eos_id = _present(self._processor.eos_id())
        self.pad_id = _present(self._processor.pad_id())
        self.fingerprint = hashlib.sha256(model).hexdigest()

    def special_tokens(self) -> dict[str, int]:
        processor = self._processor
        special = [token for token in range(self.vocab_size) if processor.is_control(token)]
        return {processor.id_to_piece(token): token for token in special}

    def pieces(self) -> list[tuple[str, float]]:
        """Spelling and score of every token, by its number; spaces are spelled as the space mark."""
        return [
            (self._processor.id_to_piece(token), self._processor.get_score(token)) for token in range(self.vocab_size)
        ]

    @property
    def unknown_id(self) -> int:
        return self._processor.unk_id()

    def byte_ids(self) -> frozenset[int]:
        """Tokens that are one byte each."""
        return frozenset(token for token in range(self.vocab_size) if self._processor.is_byte(token))

    def fallback_ids(self) -> frozenset[int]:
        processor = self._processor
        return frozenset(t for t in range(self.vocab_size) if processor.is_byte(t) or processor.is_unknown(t))

    def encode(self, text: str) -> list[int]:
        if not self.is_lossless:
            return self._processor.encode(text, num_threads=1)
        if SPACE_MARK not in text and (len(text) <= SEGMENT_CHARACTERS or not self.is_bpe):
            return self._processor.encode(text, num_threads=1)
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not self.is_lossless:
            return self._processor.encode(list(texts), num_threads=1)
        segments: list[str] = []
        ends = []
        for text in texts:
            segments.extend(_segments(text, SEGMENT_CHARACTERS if self.is_bpe else len(text)))
            ends.append(len(segments))
        encoded = self._processor.encode(segments, num_threads=1)
        batch = []
        start = 0
        for end in ends:
            if end == start + 1 and segments[start] != SPACE_MARK:
                batch.append(encoded[start])
            else:
                tokens: list[int] = []
                for segment, part in zip(segments[start:end], encoded[start:end], strict=True):
                    tokens += self._space_mark if segment == SPACE_MARK else part
                batch.append(tokens)
            start = end
        return batch

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(list(ids))

    def save(self, directory: str | Path) -> str:
        write_bytes(Path(directory) / self.file, self._model)
        return self.file

    @functools.cached_property
    def _space_mark(self) -> list[int]:
        return [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]

    @functools.cached_property
    def is_bpe(self) -> bool:
        """Whether pieces have ranks for scores. A unigram model's are logarithms, whose sums decide between equally
        likely encodings by how they were rounded, which a cut would change."""
        return all(self._processor.get_score(token).is_integer() for token in range(self.vocab_size))

    @functools.cached_property
    def is_lossless(self) -> bool:
        """Whether a text may be cut before a run of spaces, and the space mark be written as bytes.

        So it is with the models that are trained here. A model from elsewhere that adds a space at the start,
        normalizes, or has pieces with a space inside is used as it is: its tokens are those its makers get.
        """
        processor = self._processor
        if not all(processor.is_byte(token) for token in self._space_mark):
            return False
        for token in range(self.vocab_size):
            if SPACE_MARK in processor.id_to_piece(token).lstrip(SPACE_MARK):
                return False
        probe = "\ufb01  \u2126\u00a0 e\u0301\u3000\uff21\t\x01\n "  # what each normalization would change
        return (
            processor.id_to_piece(processor.encode("a")[0]) == "a"
            and processor.decode(processor.encode(probe)) == probe
        )


def _present(token: int) -> int | None:
    return token if token >= 0 else None


def _segments(text: str, size: int) -> list[str]:
    """Parts of a text whose tokens, one after the other, are its tokens; each space mark is a part of its own."""
    if SPACE_MARK in text:
        first, *others = text.split(SPACE_MARK)
        return _cut(first, size) + [part for other in others for part in (SPACE_MARK, *_cut(other, size))]
    return _cut(text, size)


def _cut(text: str, size: int) -> list[str]:
    """Cut before runs of spaces, which no piece crosses, after ``size`` characters or more."""
    parts = []
    start = 0
    while boundary := _RUN_OF_SPACES.search(text, start + size):
        parts.append(text[start : boundary.start()])
        start = boundary.start()
    parts.append(text[start:])
    return parts
