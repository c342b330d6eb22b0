"""index.json: what a prepared dataset holds, written last, so that a dataset with an index is whole."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import pydantic

from lmjax.data.files import write_bytes
from lmjax.errors import InputError

FORMAT_VERSION = 1
INDEX_FILE = "index.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerEntry:
    """The tokenizer whose tokens the shards hold."""

    kind: str
    """``bytes``, ``sentencepiece`` or ``huggingface``."""
    file: str
    """Its file, in the dataset directory."""
    fingerprint: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None = None
    special_tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    """Tokens that no text becomes, by their spelling."""
    chat_template: str | None = None
    """How a chat is written for a model with this tokenizer (Jinja), where its files say so."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One ArrayRecord file."""

    file: str
    """In the dataset directory."""
    split: str
    """``train`` or ``validation``."""
    documents: int
    tokens: int
    """With BOS and EOS."""
    sha256: str
    """Of the file, hexadecimal."""
    source: str | None = None
    """The name of the source that all its documents are of; None where the sources have no names."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkippedInput:
    """A file, or a line of one, that is not in the dataset."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """A prepared dataset."""

    format_version: Literal[1] = FORMAT_VERSION
    tokenizer: TokenizerEntry
    token_dtype: Literal["uint16", "uint32"]
    shards: tuple[ShardEntry, ...]
    """By split, then by source where those have names, then in the order of their documents."""
    token_counts: tuple[int, ...]
    """How often each token of the vocabulary is a target in the training split: in all places of a document but the
    first."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the dataset depends on besides the sources' content, as plain data."""
    inputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How many files there were, of how many bytes, and a digest of their names and sizes."""
    duplicate_documents: int = 0
    """Left out, since an equal document came before."""
    empty_documents: int = 0
    """Left out, since nothing but whitespace was in them."""
    num_skipped: int = 0
    """Files, or lines of files, that could not be read as text."""
    skipped: tuple[SkippedInput, ...] = ()
    """The first of them, by name."""

    def __post_init__(self) -> None:
        if len(self.token_counts) != self.tokenizer.vocab_size:
            raise ValueError(f"{len(self.token_counts)} token counts for a vocabulary of {self.tokenizer.vocab_size}")

    @property
    def splits(self) -> list[str]:
        """Those that have documents."""
        return list(dict.fromkeys(shard.split for shard in self.shards))

    def sources(self, split: str) -> list[str]:
        """Names of the sources that have documents in a split; none where the sources have no names."""
        names = (shard.source for shard in self.shards if shard.split == split)
        return list(dict.fromkeys(name for name in names if name is not None))

    def of_source(self, source: str | None) -> "Index":
        """The same dataset with the shards of one source alone; None gives all."""
        if source is None:
            return self
        return dataclasses.replace(self, shards=tuple(shard for shard in self.shards if shard.source == source))


_ADAPTER = pydantic.TypeAdapter(Index)


def read_index(directory: str | Path) -> Index:
    """Read a dataset's index. Raises InputError where there is none, or one that this version cannot read."""
    path = Path(directory) / INDEX_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{directory}: no prepared dataset here ({INDEX_FILE}: {error.strerror}); make it with `lmjax data prepare`"
        ) from None
    fix = "delete the directory and run `lmjax data prepare` again, or copy the dataset anew"
    try:
        version = json.loads(content)["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a dataset's index ({error!r}); {fix}") from None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: format version {version!r}, and this lmjax reads version {FORMAT_VERSION}; {fix}")
    try:
        return _ADAPTER.validate_json(content)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: damaged index ({where}: {first['msg']}); {fix}") from None


def write_index(directory: str | Path, index: Index) -> None:
    """Write ``index.json`` in one step: one line a key, and in ``shards`` and ``skipped`` one line an entry."""
    lines = []
    for key, value in _ADAPTER.dump_python(index, mode="json").items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n  " + ",\n  ".join(json.dumps(entry) for entry in value) + "\n ]"
        else:
            text = json.dumps(value)
        lines.append(f" {json.dumps(key)}: {text}")
    write_bytes(Path(directory) / INDEX_FILE, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def fingerprint(index: Index) -> str:
    """The identity of a dataset: equal if and only if tokenizer, splits and every shard's bytes are."""
    digest = hashlib.sha256(f"{index.tokenizer.fingerprint} {index.token_dtype}\n".encode())
    for shard in index.shards:
        source = "" if shard.source is None else f"{shard.source} "
        digest.update(f"{shard.split} {source}{shard.sha256}\n".encode())
    return digest.hexdigest()
