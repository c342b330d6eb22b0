"""The sample of a corpus is the same everywhere, keeps out what is held out, and trains the same model every time."""

import pytest

from lmjax.data.config import DataConfig, FilesSource, JsonlSource
from lmjax.data.parts import digest_of, split_of
from lmjax.data.sample import sample_texts, train_model, train_tokenizer
from lmjax.data.sources import list_files
from lmjax.data.tokenizer import BytesTokenizer, SentencePieceTrained, load_tokenizer
from lmjax.errors import InputError

pytestmark = pytest.mark.fast
TRAINED = SentencePieceTrained(vocab_size=320)


def config(corpus, **changes):
    fields = {
        "path": "unused",
        "sources": (FilesSource(path=str(corpus), content="code"), FilesSource(path=str(corpus))),
        "sequence_length": 16,
        "validation_fraction": 0.0,
    }
    return DataConfig(**fields | changes)


def sample(data, sample_bytes=1 << 20):
    return sample_texts(list_files(data.sources), data, sample_bytes)


def test_every_document_is_sampled_once_where_there_is_room(corpus):
    found = sample(config(corpus))
    assert len(found) == len(set(found)) == 24 + 6
    assert all(text.strip() for text in found)


def test_a_small_sample_is_the_start_of_a_large_one_and_not_the_first_source_alone(corpus):
    large = sample(config(corpus))
    small = sample(config(corpus), 2000)
    assert small[:-1] == large[: len(small) - 1]
    assert 0 < len(small[-1]) <= len(large[len(small) - 1])
    assert sum(map(len, small)) <= 2000
    assert large[:24] != [text for text in large if text.startswith("def")]


def test_the_sample_does_not_depend_on_where_the_corpus_lies(corpus, tmp_path):
    before = sample(config(corpus))
    moved = corpus.rename(tmp_path / "moved")
    assert sample(config(moved)) == before


def test_documents_that_are_held_out_are_not_sampled(corpus):
    everything = sample(config(corpus))
    held_in = sample(config(corpus, validation_fraction=0.3))
    assert 0 < len(held_in) < len(everything)
    assert held_in == [text for text in everything if split_of(digest_of(text), 0.3) == "train"]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_gives_the_same_bytes_again(corpus, model_type):
    trained = SentencePieceTrained(vocab_size=310, model_type=model_type)
    texts = sample(config(corpus))
    model = train_model(trained, texts)
    assert model == train_model(trained, texts)
    assert model != train_model(trained, texts[:20])
    assert model != train_model(TRAINED, texts)


@pytest.mark.parametrize(
    ("vocab_size", "text", "message"),
    [
        (5000, "a few words", r"vocab_size is 5000, .* at most \d+ tokens; lower it"),
        (300, "".join(map(chr, range(0x4E00, 0x4F00))), r"vocab_size is 300, .* that \d+ tokens are taken; raise it"),
    ],
)
def test_a_vocabulary_that_does_not_fit_the_text_is_an_input_error(vocab_size, text, message):
    with pytest.raises(InputError, match=message):
        train_model(SentencePieceTrained(vocab_size=vocab_size), [text])


def test_a_corpus_without_text_is_an_input_error(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="no text to train a tokenizer on in 2 files"):
        sample(config(tmp_path, sources=(FilesSource(path=str(tmp_path)),)))


def test_train_tokenizer_writes_a_new_file_only(corpus, tmp_path):
    path = tmp_path / "my.model"
    tokenizer = train_tokenizer(config(corpus), TRAINED, path)
    assert tokenizer.vocab_size == 320
    assert load_tokenizer(path).fingerprint == tokenizer.fingerprint
    before = path.read_bytes()
    with pytest.raises(InputError, match="there is a file already"):
        train_tokenizer(config(corpus), TRAINED, path)
    assert path.read_bytes() == before
    with pytest.raises(InputError, match=r"tokenizer\.kind is bytes"):
        train_tokenizer(config(corpus), BytesTokenizer(), tmp_path / "other.model")
    with pytest.raises(InputError, match="Not a directory"):
        train_tokenizer(config(corpus), TRAINED, path / "below")


def test_lines_of_jsonl_are_sampled(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\nbroken\n{"text": "one"}\n')
    assert sample(config(tmp_path, sources=(JsonlSource(path=str(tmp_path)),))) == ["one", "two"]
