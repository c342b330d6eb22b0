"""Tokenizers: what a config may ask for, what each one can do, and loading them.

SentencePiece models are in tokenizer_sentencepiece.py, tokenizer.json files in tokenizer_huggingface.py.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import pydantic

from lmjax.data.files import write_bytes
from lmjax.data.index import INDEX_FILE, TokenizerEntry, read_index
from lmjax.data.tokenizer_huggingface import HUGGINGFACE_FILE, HuggingFaceTokenizer, Roles, read_roles
from lmjax.data.tokenizer_sentencepiece import SENTENCEPIECE_FILE, SentencePieceTokenizer
from lmjax.errors import InputError
from lmjax.schema import UserPath, config_class

BYTES_FILE = "tokenizer.json"


@config_class
class BytesTokenizer:
    """One token a byte of UTF-8, and three special ones: a vocabulary of 259."""

    kind: Literal["bytes"] = "bytes"
    """Which class of tokenizer this is."""


@config_class
class SentencePieceTrained:
    """A SentencePiece model that is trained on the dataset's own sources."""

    kind: Literal["sentencepiece"] = "sentencepiece"
    """Which class of tokenizer this is."""
    vocab_size: int
    """Tokens, among them 256 bytes and 4 special ones."""
    # Its default is not written down: datasets are compared by their options, and older ones do not have this one.
    model_type: Annotated[Literal["bpe", "unigram"], pydantic.Field(exclude_if=lambda found: found == "bpe")] = "bpe"
    """How the pieces are found: by merging frequent pairs, or as the most likely pieces of a unigram model."""
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


@config_class
class HuggingFaceFile:
    """A tokenizer.json, as Hugging Face's libraries write it: BPE, WordPiece or Unigram."""

    kind: Literal["huggingface"] = "huggingface"
    """Which class of tokenizer this is."""
    path: UserPath
    """The tokenizer.json; from files beside it, such as tokenizer_config.json, come BOS, EOS and the chat template."""
    bos_token: str | None = None
    """The token that begins a document; null takes what the files beside it say, and an empty text is none."""
    eos_token: str | None = None
    """The token that ends a document; null takes what the files beside it say."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; name a tokenizer.json")
        if self.eos_token == "":
            raise ValueError("eos_token is empty, but a token has to end each document; name one, or leave it out")


TokenizerConfig = Annotated[
    BytesTokenizer | SentencePieceTrained | SentencePieceFile | HuggingFaceFile, pydantic.Field(discriminator="kind")
]


class Tokenizer(Protocol):
    """Text to tokens and back. Special tokens are added by whoever wants them: ``encode`` adds none."""

    kind: str
    """``bytes``, ``sentencepiece`` or ``huggingface``."""
    file: str
    """Name of the file that ``save`` writes."""
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    chat_template: str | None
    """Jinja; what the tokenizer's files say."""
    fingerprint: str
    """Hexadecimal; equal for tokenizers that do the same."""
    held_ids: frozenset[int]
    """Tokens whose text may change with those after them, apart from bytes at the end that are U+FFFD so far."""

    def special_tokens(self) -> dict[str, int]:
        """Tokens that no text becomes, by their spelling."""
        ...

    def fallback_ids(self) -> frozenset[int]:
        """Tokens that are not a whole character: bytes of one, and the unknown token."""
        ...

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
    chat_template: str | None = None
    fingerprint = hashlib.sha256(b"bytes, bos 256, eos 257, pad 258").hexdigest()
    held_ids: frozenset[int] = frozenset()

    def special_tokens(self) -> dict[str, int]:
        return {"<bos>": 256, "<eos>": 257, "<pad>": 258}

    def fallback_ids(self) -> frozenset[int]:
        return frozenset(range(0x80, 0x100))

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


def open_tokenizer(config: BytesTokenizer | SentencePieceFile | HuggingFaceFile) -> Tokenizer:
    """The tokenizer of a config that has one without training, fit to make a dataset.

    Raises InputError for a file that is missing or damaged, special tokens that it does not have, and a tokenizer in
    which no token ends a document.
    """
    if isinstance(config, BytesTokenizer):
        return ByteTokenizer()
    tokenizer = _open_file(config)
    if tokenizer.eos_id is None:
        special = ", ".join(map(repr, tokenizer.special_tokens())) or "none"
        fix = {
            SentencePieceTokenizer.kind: "train or export one that has </s>",
            HuggingFaceTokenizer.kind: f"set tokenizer.eos_token to one of its tokens (its special ones: {special})",
        }
        raise InputError(f"{config.path}: no token of it ends a document, which training needs; {fix[tokenizer.kind]}")
    return tokenizer


def file_fingerprint(config: SentencePieceFile | HuggingFaceFile) -> str:
    """The fingerprint of the tokenizer in a file, with the tokens that the config names."""
    return _open_file(config).fingerprint


def _open_file(config: SentencePieceFile | HuggingFaceFile) -> Tokenizer:
    path = Path(config.path)
    if isinstance(config, SentencePieceFile):
        kind, tokenizer = SentencePieceTokenizer.kind, _load(path)
    else:
        found = read_roles(path.parent)
        roles = dataclasses.replace(
            found,
            bos_token=found.bos_token if config.bos_token is None else config.bos_token or None,
            eos_token=config.eos_token or found.eos_token,
        )
        kind, tokenizer = HuggingFaceTokenizer.kind, _load(path, roles)
    if tokenizer.kind != kind:
        raise InputError(f"{path}: the file of a {tokenizer.kind} tokenizer, but tokenizer.kind is {config.kind}")
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a .model file, a tokenizer.json, or the tokenizer in a directory; a dataset's is compared with its index.

    Raises InputError for a file that is missing, damaged, or not the one that the dataset was made with.
    """
    path = Path(path)
    if not path.is_dir():
        return _load(path)
    file = next((path / name for name in (SENTENCEPIECE_FILE, HUGGINGFACE_FILE) if (path / name).is_file()), None)
    if file is None:
        raise InputError(f"{path}: no tokenizer here; looked for {SENTENCEPIECE_FILE} and {HUGGINGFACE_FILE}")
    if not (path / INDEX_FILE).is_file():
        return _load(file)
    entry = read_index(path).tokenizer
    tokenizer = _load(file, _roles_of(entry))
    if tokenizer.fingerprint != entry.fingerprint:
        raise InputError(
            f"{file}: not the tokenizer that the dataset was made with (its fingerprint is not the one in "
            f"{INDEX_FILE}); put the right file back, or delete the directory and run `lmjax data prepare` again"
        )
    return tokenizer


def tokenizer_entry(tokenizer: Tokenizer) -> TokenizerEntry:
    """What a dataset's index keeps of its tokenizer."""
    return TokenizerEntry(
        kind=tokenizer.kind,
        file=tokenizer.file,
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        special_tokens=tokenizer.special_tokens(),
        chat_template=tokenizer.chat_template,
    )


def _roles_of(entry: TokenizerEntry) -> Roles:
    spelling = {number: token for token, number in entry.special_tokens.items()}
    bos, eos, pad = (
        None if number is None else spelling.get(number) for number in (entry.bos_id, entry.eos_id, entry.pad_id)
    )
    return Roles(bos_token=bos, eos_token=eos, pad_token=pad, chat_template=entry.chat_template)


def _load(path: Path, roles: Roles | None = None) -> Tokenizer:
    """``roles`` None are those in the files beside a tokenizer.json."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the tokenizer cannot be read ({error.strerror})") from None
    if path.suffix != ".json":
        return SentencePieceTokenizer(content, str(path))
    return _from_json(content, str(path), read_roles(path.parent) if roles is None else roles)


@functools.lru_cache(maxsize=1)  # a large one takes seconds, and preparing a dataset asks for it several times
def _from_json(content: bytes, source: str, roles: Roles) -> Tokenizer:
    try:
        tree: Any = json.loads(content)
    except ValueError as error:
        raise InputError(f"{source}: not JSON, or a damaged file ({error}); copy it anew") from None
    if isinstance(tree, dict) and "model" in tree:
        return HuggingFaceTokenizer(tree, source, roles)
    if not isinstance(tree, dict) or tree.get("fingerprint") != ByteTokenizer.fingerprint:
        raise InputError(
            f"{source}: not the file of a tokenizer, or a damaged one; copy it or prepare the dataset anew"
        )
    return ByteTokenizer()
