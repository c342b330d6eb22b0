"""Tokenizers give back every text, say what is wrong with a file, and are told apart by their fingerprints."""

import json
import shutil

import numpy as np
import pydantic
import pytest
import sentencepiece

from lmjax.data import tokenizer_sentencepiece
from lmjax.data.sample import train_model
from lmjax.data.tokenizer import (
    BytesTokenizer,
    ByteTokenizer,
    HuggingFaceFile,
    SentencePieceFile,
    SentencePieceTrained,
    TokenizerConfig,
    load_tokenizer,
)
from lmjax.data.tokenizer_sentencepiece import SentencePieceTokenizer
from lmjax.errors import InputError
from tests.data.tiny_tokenizers import LINES

pytestmark = pytest.mark.fast

TEXTS = [
    "",
    " ",
    "\n",
    "def f(x):\n    if x:\n        return\t{1: 2}\n\n\n",
    "  leading, trailing  and   inner   runs   ",
    "\t\t tabs \t and\x0b\x0c\r\n other white space \u00a0\u2003\u3000",
    "▁",
    "▁a▁▁ b ▁ ▁c ▁",
    "U+2585 ▅ is reserved by the trainer",
    "日本語のテキスト。한국어 العربية ไทย",
    "😀 👩‍👩‍👧‍👦 🇩🇪 e\u0301 é ﬁ \ufeff \ue000 \U0010ffff",
    "<s></s><unk><pad><0x0A> [INST]",
    "\x01\x1f\x7f\x85 control \x00 NUL",
    "0123456789 3.14159 1e-05",
    "x" * 300,
]


@pytest.fixture
def trained(model_bytes):
    return SentencePieceTokenizer(model_bytes, "test")


@pytest.fixture(scope="module")
def unigram():
    model = train_model(SentencePieceTrained(vocab_size=320, model_type="unigram"), LINES)
    return SentencePieceTokenizer(model, "test")


@pytest.fixture(params=["bytes", "bpe", "unigram"])
def tokenizer(request, trained, unigram):
    return {"bytes": ByteTokenizer(), "bpe": trained, "unigram": unigram}[request.param]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert all(0 <= token < tokenizer.vocab_size for token in tokens)
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(tokens)


def test_random_text_comes_back(tokenizer, rng):
    alphabet = [*"▁▅ \t\n", *map(chr, range(128)), *map(chr, range(0x2570, 0x2590)), "é", "日", "😀", "\u200d"]
    for length in (1, 3, 10, 100, 1000):
        text = "".join(rng.choice(alphabet, length))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_plain_processor_loses_the_space_mark(trained):
    plain = trained._processor
    assert plain.decode(plain.encode("a▁b")) == "a b"


def test_a_batch_is_its_texts_one_by_one(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_special_tokens_have_no_text(tokenizer):
    tokens = [tokenizer.bos_id, *tokenizer.encode("a b"), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(tokens) == "a b"
    assert len({tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}) == 3


def test_bytes_that_are_no_text_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("한")[:1]) == "\ufffd"


def test_indentation_is_few_tokens_and_digits_are_one_each(trained):
    assert len(trained.encode("            ")) <= 3
    assert len(trained.encode("123456")) in (6, 7)  # a space may be a token before them


def test_a_long_text_is_cut_without_changing_its_tokens(trained, monkeypatch):
    text = "".join(f"    line  {number}:{' ' * (number % 9)}x = foo(bar)\n" for number in range(300)) + "y" * 500
    whole = trained._processor.encode(text)
    for size in (1, 7, 100, 5000):
        monkeypatch.setattr(tokenizer_sentencepiece, "SEGMENT_CHARACTERS", size)
        assert trained.encode(text) == whole
        assert trained.encode_batch(["a", text]) == [trained.encode("a"), whole]
    half = text.index("line  150") + 2
    assert trained.encode(text[:half]) + trained.encode(text[half:]) != whole, "a cut elsewhere does change them"


def test_a_long_text_of_a_unigram_model_is_not_cut(unigram, monkeypatch):
    text = "".join(f"{' ' * (number % 13)}value = {number}\n" for number in range(300))
    monkeypatch.setattr(tokenizer_sentencepiece, "SEGMENT_CHARACTERS", 7)
    assert unigram.encode(text) == unigram._processor.encode(text)
    assert unigram.encode_batch(["a", text])[1] == unigram._processor.encode(text)
    assert unigram.decode(unigram.encode(text + "▁" + text)) == text + "▁" + text


def test_a_foreign_model_is_used_as_its_makers_use_it(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 9),
        model_prefix=str(tmp_path / "foreign"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=4,
    )
    foreign = load_tokenizer(tmp_path / "foreign.model")
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "foreign.model"))
    texts = [*TEXTS, "the quick fox " * 3000]
    assert foreign.encode_batch(texts) == plain.encode(texts)
    assert [foreign.encode(text) for text in texts] == plain.encode(texts)
    assert foreign.pad_id is None
    assert plain.encode("fox", out_type=str)[0] == "▁"


def test_a_saved_tokenizer_loads_as_itself(tokenizer, tmp_path):
    file = tokenizer.save(tmp_path)
    assert file == tokenizer.file
    for path in (tmp_path, tmp_path / file, str(tmp_path / file)):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])
        assert (loaded.vocab_size, loaded.bos_id, loaded.eos_id) == (
            tokenizer.vocab_size,
            tokenizer.bos_id,
            tokenizer.eos_id,
        )


def test_fingerprints_tell_tokenizers_apart(trained, model_bytes):
    other = SentencePieceTokenizer(model_bytes.replace(b"total", b"tital", 1), "other")
    assert len({trained.fingerprint, other.fingerprint, ByteTokenizer().fingerprint}) == 3
    assert SentencePieceTokenizer(model_bytes, "again").fingerprint == trained.fingerprint


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, -1])
def test_a_truncated_model_is_an_input_error(model_bytes, tmp_path, keep):
    end = int(len(model_bytes) * keep) if isinstance(keep, float) else keep
    (tmp_path / "a.model").write_bytes(model_bytes[:end])
    with pytest.raises(InputError, match=r"a\.model: not a SentencePiece model, or a damaged one"):
        load_tokenizer(tmp_path / "a.model")


@pytest.mark.parametrize("content", [b"hello, world", b"\x00" * 100, b"{}"])
def test_a_file_that_is_no_model_is_an_input_error(tmp_path, content):
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: not "):
            load_tokenizer(tmp_path / name)


def test_no_tokenizer_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer here; looked for tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        load_tokenizer(tmp_path / "none.model")


def test_a_dataset_whose_tokenizer_was_replaced_is_refused(make_dataset, tmp_path, model_bytes):
    directory, _ = make_dataset(train=[np.arange(4)])
    assert load_tokenizer(directory).kind == "bytes"
    (tmp_path / "dataset" / "tokenizer.model").write_bytes(model_bytes)
    with pytest.raises(InputError, match=r"tokenizer\.model: not the tokenizer that the dataset was made with"):
        load_tokenizer(directory)
    shutil.rmtree(directory)


@pytest.mark.parametrize(
    "config",
    [
        BytesTokenizer(),
        SentencePieceTrained(vocab_size=512),
        SentencePieceTrained(vocab_size=512, model_type="unigram"),
        SentencePieceFile(path="a.model"),
        HuggingFaceFile(path="tokenizer.json", eos_token="</s>"),
    ],
)
def test_configs_are_told_apart_by_their_kind(config):
    adapter = pydantic.TypeAdapter(TokenizerConfig)
    tree = adapter.dump_python(config, mode="json")
    assert adapter.validate_json(json.dumps(tree)) == config


def test_the_options_of_older_datasets_are_those_of_today():
    """They were written when there was BPE alone, and datasets are compared by them."""
    tree = pydantic.TypeAdapter(TokenizerConfig).dump_python(SentencePieceTrained(vocab_size=512), mode="json")
    assert tree == {"kind": "sentencepiece", "vocab_size": 512, "sample_bytes": 16 * 2**20}


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (SentencePieceTrained, {"vocab_size": 299}, "vocab_size is 299"),
        (SentencePieceTrained, {"vocab_size": 400, "sample_bytes": 0}, "sample_bytes is 0"),
        (SentencePieceTrained, {"vocab_size": 400, "model_type": "word"}, "model_type"),
        (SentencePieceFile, {"path": ""}, "path is empty"),
        (HuggingFaceFile, {"path": ""}, "path is empty"),
        (HuggingFaceFile, {"path": "a.json", "eos_token": ""}, "eos_token is empty"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(cls, fields, message):
    with pytest.raises(InputError, match=message):
        cls(**fields)
