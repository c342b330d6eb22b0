"""The tokenizer of a GGUF file: the ids of the tokenizer that it was made from."""

import io
import json

import pytest

from lmjax.convert.gguf_tokenizer import gguf_tokenizer
from lmjax.data.tokenizer import load_tokenizer
from lmjax.errors import InputError
from tests.convert.gguf_models import METADATA, write_gguf

pytestmark = pytest.mark.fast

pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")

CORPUS = [
    "def area(width, height):\n    return width * height  # 12 34\n",
    "I'll say that they'd rather we don't; it's 2024 already, isn't it?",
    "Größe, naïve, 日本語のテキスト and Привет мир: 3.14159",
    "The quick brown fox jumps over the lazy dog 1234567890 times.",
    "    indented    text\twith\ttabs\n\n\nand blank lines   ",
]
TEXTS = [
    *CORPUS,
    "",
    " ",
    "x",
    "  1  22   333 4444",
    "x =  5\n  10\n\n\n   y",
    "I'LL WE'VE don'T",
    "²³½ Ⅷ ٣٤ ① 𝟙",
    "😀👍🏽 \u200b\u00a0 é\u0301 \x00\x7f",
    "a/b//c\r\n\r\nd",
    " leading and trailing ",
    "<s> </s> <|bos|> <unk>",
]


def write_tokenizer(tmp_path, metadata):
    """Returns the directory of the two files."""
    write_gguf(tmp_path / "model.gguf", {}, metadata={**METADATA, **metadata})
    for name, content in gguf_tokenizer(tmp_path / "model.gguf").items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def words(*steps):
    """A pre-tokenizer."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(list(steps))


def byte_level(use_regex):
    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def train_byte_level(pre_tokenizer):
    """A tokenizer, and its metadata in a GGUF file."""
    from tokenizers import Tokenizer, decoders, models, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|bos|>", "<|eos|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    return tokenizer, metadata


def train_sentencepiece(**options):
    """A SentencePiece model in the way of Llama's, and its metadata in a GGUF file."""
    import sentencepiece

    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=content,
        model_type="bpe",
        vocab_size=440,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=content.getvalue())
    ids = range(model.get_piece_size())

    def kind(number):
        checks = {2: model.is_unknown, 3: model.is_control, 6: model.is_byte, 5: model.is_unused}
        return next((name for name, check in checks.items() if check(number)), 1)

    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(number) for number in ids],
        "tokenizer.ggml.token_type": [kind(number) for number in ids],
        "tokenizer.ggml.scores": [model.get_score(number) for number in ids],
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
    }
    return model, metadata


def test_byte_level_ids_are_those_of_the_tokenizer_that_the_file_was_made_from(tmp_path):
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    theirs, metadata = train_byte_level(words(digits, byte_level(True)))
    theirs.encode_special_tokens = True  # as ours, which takes what a text spells for text
    ours = load_tokenizer(write_tokenizer(tmp_path, {**metadata, "tokenizer.ggml.pre": "smollm"}))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == text
    plain = load_tokenizer(write_tokenizer(tmp_path, metadata))  # in which digits are not cut apart
    assert any(plain.encode(text) != theirs.encode(text).ids for text in TEXTS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-2", ["I", "'ll", " pay", " ", " 12345", "\n\n ", " OK", " don", "'", "T", "!!/", "\n"]),
        ("default", ["I", "'ll", " pay", " ", " 12345", "\n\n ", " OK", " don", "'", "T", "!!/", "\n"]),
        ("smollm", ["I", "'ll", " pay", "  ", "1", "2", "3", "4", "5", "\n\n ", " OK", " don", "'", "T", "!!/", "\n"]),
        ("llama-bpe", ["I", "'ll", " pay", " ", " ", "123", "45", "\n\n", " ", " OK", " don", "'T", "!!/\n"]),
        ("tekken", ["I", "'ll", " pay", " ", " ", "1", "2", "3", "4", "5", "\n\n", " ", " OK", " don", "'T", "!!/\n"]),
    ],
)
def test_a_text_is_cut_as_the_name_in_the_file_says(tmp_path, name, expected):
    _, metadata = train_byte_level(words(byte_level(True)))
    write_gguf(tmp_path / "model.gguf", {}, metadata={**METADATA, **metadata, "tokenizer.ggml.pre": name})
    tree = gguf_tokenizer(tmp_path / "model.gguf")["tokenizer.json"]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(tree))
    text = "I'll pay  12345\n\n  OK don'T!!/\n"
    found = [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert found == expected


def test_whole_words_go_before_merges_where_the_name_says_so(tmp_path):
    _, metadata = train_byte_level(words(byte_level(True)))
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "zebraz"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 1]
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    for name, whole in {"llama-bpe": True, "tekken": True, "smollm": False, "gpt-2": False}.items():
        tokenizer = load_tokenizer(write_tokenizer(tmp_path, {**metadata, "tokenizer.ggml.pre": name}))
        assert (tokenizer.encode("zebraz") == [last]) is whole


def test_sentencepiece_ids_are_those_of_sentencepiece(tmp_path):
    theirs, metadata = train_sentencepiece()
    ours = load_tokenizer(write_tokenizer(tmp_path, metadata))
    assert 6 in metadata["tokenizer.ggml.token_type"]
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    unprefixed, metadata = train_sentencepiece(add_dummy_prefix=False)
    ours = load_tokenizer(write_tokenizer(tmp_path, {**metadata, "tokenizer.ggml.add_space_prefix": False}))
    for text in TEXTS:
        assert ours.encode(text) == unprefixed.encode(text), text
    assert any(theirs.encode(text) != unprefixed.encode(text) for text in TEXTS)


def test_roles_and_chat_template_come_along(tmp_path):
    _, metadata = train_byte_level(words(byte_level(True)))
    more = {"tokenizer.ggml.padding_token_id": 1, "tokenizer.chat_template": "{{ messages }}"}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, {**metadata, **more}))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.special_tokens() == {"<|bos|>": 0, "<|eos|>": 1}
    assert tokenizer.vocab_size == len(metadata["tokenizer.ggml.tokens"])
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["pad_token"] == "<|eos|>"
    assert "unk_token" not in config


@pytest.mark.parametrize(
    ("pre", "flags", "ends"),
    [
        ("gpt-2", {}, ([], [])),
        ("gpt-2", {"bos": True}, ([0], [])),
        ("gpt-2", {"bos": True, "eos": True}, ([0], [1])),
        ("llama-bpe", {}, ([0], [])),
        ("llama-bpe", {"bos": False, "eos": True}, ([], [1])),
    ],
)
def test_a_text_gets_the_ends_that_the_file_says(tmp_path, pre, flags, ends):
    _, metadata = train_byte_level(words(byte_level(True)))
    metadata |= {f"tokenizer.ggml.add_{role}_token": value for role, value in flags.items()}
    write_tokenizer(tmp_path, {**metadata, "tokenizer.ggml.pre": pre})
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner = tokenizer.encode("some text", add_special_tokens=False).ids
    assert tokenizer.encode("some text").ids == [*ends[0], *inner, *ends[1]]


def test_tokens_that_the_user_defined_are_found_in_a_text_and_are_not_special(tmp_path):
    _, metadata = train_byte_level(words(byte_level(True)))
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    metadata |= {"tokenizer.ggml.tokens": [*tokens, "<think>"], "tokenizer.ggml.token_type": [*types, 4]}
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, metadata))
    assert tokenizer.encode("a<think>b")[1] == len(tokens)
    assert tokenizer.decode([len(tokens)]) == "<think>"
    assert "<think>" not in tokenizer.special_tokens()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model": None}, "its metadata lacks tokenizer.ggml.model; put the model's tokenizer.json beside"),
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; gpt2 .* and llama .* are read"),
        ({"pre": None}, "its metadata lacks tokenizer.ggml.pre"),
        ({"pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2'; known are default, gpt-2, smollm"),
        ({"merges": None}, "its metadata lacks tokenizer.ggml.merges"),
        ({"merges": ["a zzz"]}, "the merge 'a zzz' leads to no token"),
        ({"merges": "a b"}, "tokenizer.ggml.merges is str, where list is expected"),
        ({"tokens": ["a", "a"]}, "tokenizer.ggml.tokens has a token twice"),
        ({"token_type": [1]}, "tokens and 1 types of tokens"),
        ({"bos_token_id": 9999}, "tokenizer.ggml.bos_token_id is 9999, and there are 420 tokens"),
        ({"bos_token_id": None, "add_bos_token": True}, "a text is to have a token for BOS, and which one is not said"),
        ({"add_space_prefix": True}, "a byte-level tokenizer with a space before each text is not read"),
        ({"model": "llama", "scores": [0.0]}, "420 tokens and 1 scores"),
        ({"model": "llama", "scores": [0.0], "remove_extra_whitespaces": True}, "remove_extra_whitespaces is not read"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_refused(tmp_path, changes, what):
    _, metadata = train_byte_level(words(byte_level(True)))
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    write_gguf(tmp_path / "model.gguf", {}, metadata={**METADATA, **metadata})
    with pytest.raises(InputError, match=f"model.gguf: .*{what}"):
        gguf_tokenizer(tmp_path / "model.gguf")
