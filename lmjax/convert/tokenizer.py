"""Tokenizers in Hugging Face directories: the one that came with a model, and ours as such files."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from lmjax.convert.gguf_files import find_gguf
from lmjax.convert.gguf_tokenizer import gguf_tokenizer, merges_of
from lmjax.convert.settings import CONFIG_FILE
from lmjax.data.tokenizer import Tokenizer, load_tokenizer
from lmjax.data.tokenizer_huggingface import (
    HUGGINGFACE_FILE,
    ROLES_FILE,
    HuggingFaceTokenizer,
    Roles,
    byte_of_character,
    read_roles,
)
from lmjax.data.tokenizer_sentencepiece import SENTENCEPIECE_FILE, SPACE_MARK, SentencePieceTokenizer
from lmjax.errors import InputError

GENERATION_FILE = "generation_config.json"


def tokenizer_in(path: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory or of a GGUF file.

    Its ``bos_id`` is the token that the tokenizer itself puts before a text, by tokenizer_config.json's add_bos_token
    or else by the post-processor of tokenizer.json, and None where it puts none: what has one is not always given it.
    Raises InputError where there is no tokenizer, or none that is read.
    """
    if (path / HUGGINGFACE_FILE).is_file():
        tree = _read_object(path / HUGGINGFACE_FILE)
        return _as_used(tree, str(path / HUGGINGFACE_FILE), read_roles(path), _read_object(path / ROLES_FILE))
    if (path / SENTENCEPIECE_FILE).is_file():
        return load_tokenizer(path / SENTENCEPIECE_FILE)
    if (file := find_gguf(path)) is not None:
        found = gguf_tokenizer(file)
        settings = found[ROLES_FILE]
        roles = Roles(**{field.name: settings.get(field.name) for field in dataclasses.fields(Roles)})
        return _as_used(found[HUGGINGFACE_FILE], str(file), roles, settings)
    raise InputError(
        f"{path}: no tokenizer: looked for {HUGGINGFACE_FILE}, {SENTENCEPIECE_FILE} and a GGUF file. Put the model's "
        f"{HUGGINGFACE_FILE} there; transformers' tokenizer.save_pretrained writes one"
    )


def end_ids_in(path: Path) -> frozenset[int]:
    """The tokens that end a text by generation_config.json, or else by config.json, as transformers' generate has it.

    Raises InputError for what is not a token's number, or a list of these.
    """
    files = [file for file in (path / GENERATION_FILE, path / CONFIG_FILE) if file.is_file()]
    if not files:
        return frozenset()
    found = _read_object(files[0]).get("eos_token_id")
    numbers = [] if found is None else found if isinstance(found, list) else [found]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise InputError(f"{files[0]}: eos_token_id is {found!r}; it is the number of a token, or a list of numbers")
    return frozenset(numbers)


def huggingface_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files, by name, with which Hugging Face's libraries give the tokens that a run was trained on: a text's own,
    after BOS where the tokenizer has one. A SentencePiece model comes along as it is.

    Text that spells a special token out becomes that token there, and stays text here; of encodings that a unigram
    model finds equally likely, there may be another one.
    """
    found = _saved(tokenizer)
    if tokenizer.kind == HuggingFaceTokenizer.kind:
        return found | _with_bos(found, tokenizer)
    if isinstance(tokenizer, SentencePieceTokenizer):
        tree = _sentencepiece_tree(tokenizer)
    else:
        tree = _bytes_tree(tokenizer)
        found = {}  # the file of a tokenizer of bytes has the same name
    if tree is None:  # a model from elsewhere: its own file is all there is
        return found
    spelling = {number: token for token, number in tokenizer.special_tokens().items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    roles = {role: spelling.get(number) for role, number in ids.items() if number is not None}
    made = _saved(HuggingFaceTokenizer(tree, tokenizer.file, Roles(**roles)))
    return found | made | _with_bos(made, tokenizer)


def _with_bos(files: dict[str, bytes], tokenizer: Tokenizer) -> dict[str, bytes]:
    """tokenizer.json and its settings, with BOS put before each text where the tokenizer has it."""
    tree, settings = (json.loads(files[name]) for name in (HUGGINGFACE_FILE, ROLES_FILE))
    bos = settings["bos_token"]
    if bos is None:
        return {}
    if HuggingFaceTokenizer(tree, HUGGINGFACE_FILE, Roles()).first_added() is None:
        text, special = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": bos, "type_id": 0}}
        pair = {"Sequence": {"id": "B", "type_id": 1}}
        template = {
            "type": "TemplateProcessing",
            "single": [special, text],
            "pair": [special, text, pair],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        }
        before = tree.get("post_processor")
        tree["post_processor"] = template if before is None else {"type": "Sequence", "processors": [before, template]}
    settings["add_bos_token"] = True
    return {HUGGINGFACE_FILE: json.dumps(tree).encode(), ROLES_FILE: json.dumps(settings, indent=1).encode() + b"\n"}


def _saved(tokenizer: Tokenizer) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _sentencepiece_tree(tokenizer: SentencePieceTokenizer) -> dict[str, Any] | None:
    """tokenizer.json of a model that takes each text as it is; None for one that changes it first."""
    if not tokenizer.is_lossless:
        return None
    pieces, special = tokenizer.pieces(), tokenizer.special_tokens()
    held = {*special.values(), tokenizer.unknown_id, *tokenizer.byte_ids()}
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
    back = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    if tokenizer.is_bpe:
        usable = {piece: score for number, (piece, score) in enumerate(pieces) if number not in held}
        model: dict[str, Any] = {
            "type": "BPE",
            "vocab": {piece: number for number, (piece, _) in enumerate(pieces)},
            "merges": merges_of(usable),
            "unk_token": pieces[tokenizer.unknown_id][0],
            "fuse_unk": True,
            "byte_fallback": True,
        }
    else:
        model = {"type": "Unigram", "unk_id": tokenizer.unknown_id, "vocab": pieces, "byte_fallback": True}
    return {
        "version": "1.0",
        "added_tokens": _added({pieces[tokenizer.unknown_id][0]: tokenizer.unknown_id, **special}),
        "normalizer": mark,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": model,
    }


def _added(tokens: dict[str, int]) -> list[dict[str, Any]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [{"id": number, "content": token, **plain, "special": True} for token, number in tokens.items()]


def _bytes_tree(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json of a tokenizer whose tokens are bytes."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": _added(tokenizer.special_tokens()),
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": byte_of_character(), "merges": []},
    }


def _as_used(tree: dict[str, Any], source: str, roles: Roles, settings: dict[str, Any]) -> Tokenizer:
    """With BOS where the tokenizer adds it."""
    tokenizer = HuggingFaceTokenizer(tree, source, roles)
    adds = settings.get("add_bos_token")
    if not isinstance(adds, bool):
        first = tokenizer.first_added()
        if first is not None:
            return HuggingFaceTokenizer(tree, source, dataclasses.replace(roles, bos_token=first))
        adds = False
    return tokenizer if adds else HuggingFaceTokenizer(tree, source, dataclasses.replace(roles, bos_token=None))


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not JSON, or a damaged file ({error}); copy it anew") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: {type(found).__name__} where an object is expected; copy it anew")
    return found
