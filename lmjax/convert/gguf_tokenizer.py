"""The tokenizer in a GGUF file's metadata, as the two files that Hugging Face's libraries (and lmjax) read.

How a text is cut before its tokens are looked up is only named there; what the names mean is in llama.cpp's
llama-vocab.cpp, and the tables below follow it and the tokenizer.json of the models that the names come from.
"""

from pathlib import Path
from typing import Any, NamedTuple

from lmjax.convert.gguf_header import Header, read_header
from lmjax.errors import InputError

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Types of tokens in the file; the others are bytes and unused ones."""
SPACE = "\u2581"
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""Names in tokenizer_config.json, and in ``tokenizer.ggml.NAME_token_id``."""

LETTERS = r"\p{Lm}\p{Lo}\p{M}"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{LETTERS}]*[\p{{Ll}}{LETTERS}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{LETTERS}]+[\p{{Ll}}{LETTERS}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Split(NamedTuple):
    """How a byte-level tokenizer cuts a text into words."""

    steps: tuple[dict[str, Any], ...]
    whole_words: bool = False
    """Whether a word that is in the vocabulary is one token, whatever the merges say."""
    add_bos: bool = False
    """Where the file does not say."""


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _regex(pattern: str) -> tuple[dict[str, Any], ...]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return (split, _bytes(use_regex=False))


_GPT2 = Split((_bytes(use_regex=True),))
_DIGITS = Split(({"type": "Digits", "individual_digits": True}, _bytes(use_regex=True)))
_LLAMA3 = Split(_regex(LLAMA3), whole_words=True, add_bos=True)
_TEKKEN = Split(_regex(TEKKEN), whole_words=True, add_bos=True)
SPLITS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "tekken": _TEKKEN,
}
"""By the name in ``tokenizer.ggml.pre``."""


def gguf_tokenizer(path: Path) -> dict[str, dict[str, Any]]:
    """The content of tokenizer.json and of tokenizer_config.json, by these names.

    Raises InputError where the file has no tokenizer, or one of a kind that is not known.
    """
    header = read_header(path)
    kind = _take(header, "ggml.model", str)
    if kind == "gpt2":
        tree, add_bos = _byte_level(header)
    elif kind == "llama":
        tree, add_bos = _sentencepiece(header)
    else:
        raise InputError(
            f"{path}: tokenizer.ggml.model is {kind!r}; gpt2 (byte-level BPE) and llama (SentencePiece BPE) are read; "
            f"put the model's {TOKENIZER_FILE} beside the file"
        )
    roles = {role: _token(header, f"ggml.{key}_token_id") for role, key in ROLES.items()}
    before = _end(header, "bos", add_bos)
    after = _end(header, "eos", False)
    tree["post_processor"] = _template(before, after)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {role: token for role, token in roles.items() if token is not None}
    template = _take(header, "chat_template", str, None)
    if template is not None:
        config["chat_template"] = template
    return {TOKENIZER_FILE: tree, TOKENIZER_CONFIG_FILE: config}


def _end(header: Header, role: str, default: bool) -> dict[str, int]:
    """The id, by its spelling, of the token that a text gets at one end; empty where it gets none."""
    if not _take(header, f"ggml.add_{role}_token", bool, default):
        return {}
    token = _token(header, f"ggml.{role}_token_id")
    if token is None:
        raise InputError(f"{header.path}: a text is to have a token for {role.upper()}, and which one is not said")
    return {token: _take(header, f"ggml.{role}_token_id", int)}


def _byte_level(header: Header) -> tuple[dict[str, Any], bool]:
    name = _take(header, "ggml.pre", str)
    if name not in SPLITS:
        raise InputError(
            f"{header.path}: tokenizer.ggml.pre is {name!r}; known are {', '.join(SPLITS)}; put the model's "
            f"{TOKENIZER_FILE} beside the file"
        )
    if _take(header, "ggml.add_space_prefix", bool, False):
        raise InputError(f"{header.path}: a byte-level tokenizer with a space before each text is not read")
    split = SPLITS[name]
    vocabulary = _vocabulary(header)
    merges = [merge.split(" ") for merge in _take(header, "ggml.merges", list)]
    lost = next((merge for merge in merges if len(merge) != 2 or "".join(merge) not in vocabulary), None)
    if lost is not None:
        raise InputError(f"{header.path}: the merge {' '.join(lost)!r} leads to no token; fetch the file anew")
    steps = [dict(step) for step in split.steps]
    tree = {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": _bytes(use_regex=True),
        "model": {"ignore_merges": split.whole_words, "vocab": vocabulary, "merges": merges},
    }
    return _tree(header, tree), split.add_bos


def _sentencepiece(header: Header) -> tuple[dict[str, Any], bool]:
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if _take(header, f"ggml.{key}", object, None):
            raise InputError(
                f"{header.path}: tokenizer.ggml.{key} is not read; put the model's {TOKENIZER_FILE} beside the file"
            )
    vocabulary = _vocabulary(header)
    prefix = _take(header, "ggml.add_space_prefix", bool, True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    tree = {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": SPACE}] * prefix + [replace],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}] + [strip] * prefix,
        },
        "model": {
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": _token(header, "ggml.unknown_token_id"),
            "vocab": vocabulary,
            "merges": _merges(header, vocabulary),
        },
    }
    return _tree(header, tree), True


def _merges(header: Header, vocabulary: dict[str, int]) -> list[list[str]]:
    """The file has the scores alone."""
    scores, types = _take(header, "ggml.scores", list), _types(header)
    if len(scores) != len(types):
        raise InputError(f"{header.path}: {len(types)} tokens and {len(scores)} scores; fetch the file anew")
    return merges_of({token: scores[number] for token, number in vocabulary.items() if types[number] == NORMAL})


def merges_of(scores: dict[str, float]) -> list[list[str]]:
    """The merges that lead to each token of a SentencePiece BPE model, those of the best score first.

    ``scores`` are of the pieces that a text is merged into, in the order of their numbers: not bytes or special ones.
    """
    found = [
        (-score, cut, number, token)
        for number, (token, score) in enumerate(scores.items())
        for cut in range(1, len(token))
        if token[:cut] in scores and token[cut:] in scores
    ]
    return [[token[:cut], token[cut:]] for _, cut, _, token in sorted(found)]


def _tree(header: Header, parts: dict[str, Any]) -> dict[str, Any]:
    """A whole tokenizer.json: with the tokens that a text is searched for before anything else, and the defaults."""
    tokens, types = _take(header, "ggml.tokens", list), _types(header)
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": token, **plain, "special": kind != USER_DEFINED}
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **parts["model"],
    }
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts, "model": model}


def _template(before: dict[str, int], after: dict[str, int]) -> dict[str, Any] | None:
    """What puts BOS before each text and EOS behind it, given their ids by their spelling."""
    if not before and not after:
        return None

    def text(name: str, place: int) -> list[dict[str, Any]]:
        special = [[{"SpecialToken": {"id": token, "type_id": place}} for token in part] for part in (before, after)]
        return [*special[0], {"Sequence": {"id": name, "type_id": place}}, *special[1]]

    tokens = {token: {"id": token, "ids": [number], "tokens": [token]} for token, number in (before | after).items()}
    pair = text("A", 0) + text("B", 1)
    return {"type": "TemplateProcessing", "single": text("A", 0), "pair": pair, "special_tokens": tokens}


def _vocabulary(header: Header) -> dict[str, int]:
    tokens = _take(header, "ggml.tokens", list)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise InputError(f"{header.path}: tokenizer.ggml.tokens has a token twice; fetch the file anew")
    return vocabulary


def _types(header: Header) -> list[int]:
    tokens = _take(header, "ggml.tokens", list)
    types = _take(header, "ggml.token_type", list)
    if len(types) != len(tokens):
        raise InputError(f"{header.path}: {len(tokens)} tokens and {len(types)} types of tokens; fetch the file anew")
    return types


def _token(header: Header, key: str) -> str | None:
    number = _take(header, key, int, None)
    tokens = _take(header, "ggml.tokens", list)
    if number is not None and not 0 <= number < len(tokens):
        raise InputError(f"{header.path}: tokenizer.{key} is {number}, and there are {len(tokens)} tokens")
    return None if number is None else tokens[number]


_REQUIRED = object()


def _take(header: Header, key: str, kind: type, default: Any = _REQUIRED) -> Any:
    """A value of the metadata. Raises InputError where it is missing and has no default, or is of another kind."""
    value = header.metadata.get(f"tokenizer.{key}", default)
    if value is _REQUIRED:
        raise InputError(
            f"{header.path}: its metadata lacks tokenizer.{key}; put the model's {TOKENIZER_FILE} beside the file"
        )
    if value is not default and not isinstance(value, kind):
        raise InputError(f"{header.path}: tokenizer.{key} is {type(value).__name__}, where {kind.__name__} is expected")
    return value
