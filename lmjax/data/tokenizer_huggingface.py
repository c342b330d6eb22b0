"""A Hugging Face tokenizer.json (BPE, WordPiece or Unigram), run by the ``tokenizers`` package."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmjax.data.files import write_bytes
from lmjax.errors import InputError

HUGGINGFACE_FILE = "tokenizer.json"
ROLES_FILE = "tokenizer_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roles:
    """What a tokenizer.json does not say: which token begins and ends a text, and how a chat is written."""

    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    chat_template: str | None = None
    """Jinja."""


class HuggingFaceTokenizer:
    """A tokenizer.json. ``tree`` is its content; ``source`` names it in errors.

    Truncation, padding and BPE dropout that were stored with it are switched off: a text has one encoding, whole.
    Special tokens that are spelled out in a text are encoded as text. Raises InputError for a file that ``tokenizers``
    cannot read, and for roles whose token is not in the vocabulary.
    """

    kind = "huggingface"
    file = HUGGINGFACE_FILE

    def __init__(self, tree: dict[str, Any], source: str, roles: Roles):
        # One process is one core here; read by the package when it encodes.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        model = tree["model"]
        if isinstance(model, dict) and model.get("dropout") is not None:
            model = {**model, "dropout": None}
        tree = {**tree, "model": model, "truncation": None, "padding": None}
        self._content = json.dumps(tree).encode()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self._content.decode())
        except Exception as error:  # noqa: BLE001  the package raises nothing more special
            raise InputError(f"{source}: not a tokenizer that `tokenizers` can read ({error}); copy it anew") from None
        self._tokenizer.encode_special_tokens = True
        self._model: dict[str, Any] = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
        self._byte_level = _mentions(tree.get("decoder"), "ByteLevel")
        # Where one byte of a run of byte tokens is wrong, the package gives U+FFFD for each byte of the run.
        run_of_bytes = range(256 if _mentions(tree.get("decoder"), "ByteFallback") else 0)
        found = (self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in run_of_bytes)
        self.held_ids = frozenset(token for token in found if token is not None)
        self._roles = roles
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise InputError(f"{source}: the vocabulary is empty; copy the file anew")
        self.vocab_size: int = max(ids) + 1
        self.chat_template = roles.chat_template
        self.bos_id = self._id_of("bos_token", roles.bos_token, source)
        self.eos_id = self._id_of("eos_token", roles.eos_token, source)
        self.pad_id = self._id_of("pad_token", roles.pad_token, source)
        digest = hashlib.sha256(self._content)
        digest.update(json.dumps(dataclasses.asdict(roles)).encode())
        self.fingerprint = digest.hexdigest()

    def special_tokens(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: number for number, token in sorted(added.items()) if token.special}
        named = {
            self._roles.bos_token: self.bos_id,
            self._roles.eos_token: self.eos_id,
            self._roles.pad_token: self.pad_id,
        }
        return special | {token: number for token, number in named.items() if token is not None and number is not None}

    def first_added(self) -> str | None:
        """The special token that the file's post-processor puts before a text, where it puts one there."""
        plain = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        is_before = len(whole) > len(plain) and whole[: len(plain)] != plain
        return self._tokenizer.id_to_token(whole[0]) if is_before else None

    def fallback_ids(self) -> frozenset[int]:
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        found = set(self.held_ids)
        if self._byte_level:
            bytes_of = byte_of_character()
            found |= {number for token, number in vocabulary.items() if _is_part(token, bytes_of)}
        unknown = self._model.get("unk_token")
        if unknown is not None:
            found |= {number for token, number in vocabulary.items() if token == unknown}
        if self._model.get("unk_id") is not None:
            found.add(self._model["unk_id"])
        return frozenset(found)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = [found.ids for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        spelled = self._spelled
        if not spelled:
            return encoded
        return [
            ids if spelled.keys().isdisjoint(ids) else [part for token in ids for part in spelled.get(token, (token,))]
            for ids in encoded
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def save(self, directory: str | Path) -> str:
        """Writes the roles first, as tokenizer_config.json: together they are what other libraries load too."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        roles = json.dumps({**config, **dataclasses.asdict(self._roles)}, indent=1).encode() + b"\n"
        write_bytes(Path(directory) / ROLES_FILE, roles)
        write_bytes(Path(directory) / self.file, self._content)
        return self.file

    @functools.cached_property
    def _spelled(self) -> dict[int, list[int]]:
        """The characters of special tokens that the model itself may find in a text, since it knows them as pieces.

        A BPE model has no merges that lead to them, unless it looks up whole words first.
        """
        if self._model.get("type") == "BPE" and not self._model.get("ignore_merges"):
            return {}
        pieces = self._tokenizer.get_vocab(with_added_tokens=False)
        unknown = self._model.get("unk_id", pieces.get(self._model.get("unk_token", "")))
        prefix = self._model.get("continuing_subword_prefix") or ""
        spelled = {}
        for token, number in self.special_tokens().items():
            if token in pieces and number != unknown:
                characters = [character if place == 0 else prefix + character for place, character in enumerate(token)]
                found = [pieces.get(character, unknown) for character in characters]
                spelled[number] = [part for part in found if part is not None]
        return spelled

    def _id_of(self, role: str, token: str | None, source: str) -> int | None:
        if token is None:
            return None
        number = self._tokenizer.token_to_id(token)
        if number is None:
            added = self._tokenizer.get_added_tokens_decoder()
            special = ", ".join(repr(entry.content) for entry in added.values() if entry.special) or "none"
            raise InputError(
                f"{source}: {role} is {token!r}, which its vocabulary of {self.vocab_size} tokens does not have; "
                f"set tokenizer.{role} to a token of it (its special ones: {special})"
            )
        return number


def read_roles(directory: Path) -> Roles:
    """The roles in the files that lie beside a tokenizer.json; none where there is no such file.

    Raises InputError for a file that cannot be read.
    """
    config = _read_json(directory / ROLES_FILE)
    named = _read_json(directory / "special_tokens_map.json")
    tokens = {}
    for role in ("bos_token", "eos_token", "pad_token"):
        found = config.get(role) or named.get(role)
        tokens[role] = found.get("content") if isinstance(found, dict) else found
        if not isinstance(tokens[role], str | None):
            raise InputError(f"{directory}: {role} in {ROLES_FILE} is {found!r}; it has to be a token's text, or null")
    template = directory / "chat_template.jinja"
    if template.is_file():
        return Roles(**tokens, chat_template=template.read_text(encoding="utf-8"))
    return Roles(**tokens, chat_template=_template(config.get("chat_template"), directory / ROLES_FILE))


def _template(found: Any, source: Path) -> str | None:
    """Of several templates the one named default."""
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    if not isinstance(found, str | None):
        raise InputError(f"{source}: chat_template is {type(found).__name__}; it has to be text, or several texts")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); copy it anew, or move it away") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: {type(content).__name__} where an object is expected; copy it anew")
    return content


def _mentions(tree: Any, kind: str) -> bool:
    """Whether a component of a tokenizer.json is of this type, or has one in it."""
    if isinstance(tree, list):
        return any(_mentions(entry, kind) for entry in tree)
    if isinstance(tree, dict):
        return tree.get("type") == kind or any(_mentions(entry, kind) for entry in tree.values())
    return False


@functools.cache
def byte_of_character() -> dict[str, int]:
    """The byte that each character stands for in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _is_part(token: str, byte_of: dict[str, int]) -> bool:
    """Whether a byte-level token has a character in part only."""
    try:
        bytes(byte_of[character] for character in token).decode()
    except UnicodeDecodeError:
        return True
    except KeyError:  # not spelled in bytes: a token that was added
        return False
    return False
