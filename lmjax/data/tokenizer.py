"""Tokenizers: bytes, and SentencePiece models that encode any text without loss."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

import pydantic
import sentencepiece

from lmjax.data.files import write_bytes
from lmjax.data.index import INDEX_FILE, read_index
from lmjax.errors import InputError
from lmjax.schema import UserPath, config_class

BYTES_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
SPACE_MARK = "\u2581"
"""What SentencePiece writes for a space in its pieces; in a text it would come back as a space."""
SEGMENT_CHARACTERS = 1 << 14
"""Longer texts are encoded in parts where that changes nothing: the encoder's memory grows with the part."""
_RUN_OF_SPACES = re.compile("(?<! ) ")


@config_class
class BytesTokenizer:
    """One token a byte of UTF-8, and three special ones: a vocabulary of 259."""

    kind: Literal["bytes"] = "bytes"
    """Which class of tokenizer this is."""


@config_class
class SentencePieceTrained:
    """A SentencePiece BPE model that is trained on the dataset's own sources."""

    kind: Literal["sentencepiece"] = "sentencepiece"
    """Which class of tokenizer this is."""
    vocab_size: int
    """Tokens, among them 256 bytes and 4 special ones."""
    sample_bytes: int = 16 * 2**20
    """Bytes of text that it is trained on; the sample is a pure function of the sources."""

    def __post_init__(self) -> None:
        if self.vocab_size < 300:
            raise ValueError(
                f"vocab_size is {self.vocab_size}; bytes and special tokens alone are 260: give 300 or more"
            )
        if self.sample_bytes < 1:
            raise ValueError(f"sample_bytes is {self.sample_bytes}; it has to be above 0")


@config_class
class SentencePieceFile:
    """A SentencePiece model that is there already."""

    kind: Literal["sentencepiece_file"] = "sentencepiece_file"
    """Which class of tokenizer this is."""
    path: UserPath
    """The .model file."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; name a .model file")


TokenizerConfig = Annotated[
    BytesTokenizer | SentencePieceTrained | SentencePieceFile, pydantic.Field(discriminator="kind")
]


class Tokenizer(Protocol):
    """Text to tokens and back. Special tokens are added by whoever wants them: ``encode`` adds none."""

    kind: str
    """``bytes`` or ``sentencepiece``."""
    file: str
    """Name of the file that ``save`` writes."""
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    fingerprint: str
    """Hexadecimal; equal for tokenizers that do the same."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without BOS and EOS."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, on one core."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens; special ones have none, and bytes that are no UTF-8 become U+FFFD."""
        ...

    def save(self, directory: str | Path) -> str:
        """Write the tokenizer's file into a directory, in one step. Returns its name."""
        ...


class ByteTokenizer:
    """Token i is the byte i; then BOS, EOS and padding."""

    kind = "bytes"
    file = BYTES_FILE
    vocab_size = 259
    bos_id: int | None = 256
    eos_id: int | None = 257
    pad_id: int | None = 258
    fingerprint = hashlib.sha256(b"bytes, bos 256, eos 257, pad 258").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")

    def save(self, directory: str | Path) -> str:
        content = {"kind": self.kind, "fingerprint": self.fingerprint}
        write_bytes(Path(directory) / self.file, json.dumps(content).encode() + b"\n")
        return self.file


class SentencePieceTokenizer:
    """A SentencePiece model. ``model`` is the content of its file; ``source`` names that in errors."""

    kind = "sentencepiece"
    file = SENTENCEPIECE_FILE

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

    def encode(self, text: str) -> list[int]:
        if not self._lossless:
            return self._processor.encode(text, num_threads=1)
        if len(text) <= SEGMENT_CHARACTERS and SPACE_MARK not in text:
            return self._processor.encode(text, num_threads=1)
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not self._lossless:
            return self._processor.encode(list(texts), num_threads=1)
        segments: list[str] = []
        ends = []
        for text in texts:
            segments.extend(_segments(text))
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
    def _lossless(self) -> bool:
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


def _segments(text: str) -> list[str]:
    """Parts of a text whose tokens, one after the other, are its tokens; each space mark is a part of its own."""
    if SPACE_MARK in text:
        first, *others = text.split(SPACE_MARK)
        return _cut(first) + [part for other in others for part in (SPACE_MARK, *_cut(other))]
    return _cut(text)


def _cut(text: str) -> list[str]:
    """Cut before runs of spaces, which no piece crosses."""
    parts = []
    start = 0
    while boundary := _RUN_OF_SPACES.search(text, start + SEGMENT_CHARACTERS):
        parts.append(text[start : boundary.start()])
        start = boundary.start()
    parts.append(text[start:])
    return parts


def _bytes_tokenizer(content: bytes, source: str) -> Tokenizer:
    try:
        found = json.loads(content)["fingerprint"]
    except (ValueError, KeyError, TypeError):
        found = None
    if found != ByteTokenizer.fingerprint:
        raise InputError(f"{source}: not the file of a bytes tokenizer, or a damaged one; prepare the dataset anew")
    return ByteTokenizer()


_LOADERS: dict[str, Callable[[bytes, str], Tokenizer]] = {
    SENTENCEPIECE_FILE: SentencePieceTokenizer,
    BYTES_FILE: _bytes_tokenizer,
}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a .model file, or the tokenizer in a directory; a dataset's is compared with the dataset's index.

    Raises InputError for a file that is missing, damaged, or not the one that the dataset was made with.
    """
    path = Path(path)
    if not path.is_dir():
        load = _bytes_tokenizer if path.name == BYTES_FILE else SentencePieceTokenizer
        return load(_read(path), str(path))
    file = next((path / name for name in _LOADERS if (path / name).is_file()), None)
    if file is None:
        raise InputError(f"{path}: no tokenizer here; looked for {' and '.join(_LOADERS)}")
    tokenizer = _LOADERS[file.name](_read(file), str(file))
    if (path / INDEX_FILE).is_file() and tokenizer.fingerprint != read_index(path).tokenizer.fingerprint:
        raise InputError(
            f"{file}: not the tokenizer that the dataset was made with (its fingerprint is not the one in "
            f"{INDEX_FILE}); put the right file back, or delete the directory and run `lmjax data prepare` again"
        )
    return tokenizer


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the tokenizer cannot be read ({error.strerror})") from None
