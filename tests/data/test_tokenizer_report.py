"""Fertility counts what a tokenizer makes of a text, by source, on a sample that is the same each time."""

import pytest

from lmjax.data.config import DataConfig, FilesSource
from lmjax.data.tokenizer import ByteTokenizer
from lmjax.data.tokenizer_report import Fertility, fertility, report_fertility
from lmjax.data.tokenizer_sentencepiece import SentencePieceTokenizer
from lmjax.errors import InputError

pytestmark = pytest.mark.fast


def config(corpus, **changes):
    sources = (FilesSource(path=str(corpus), content="code"), FilesSource(path=str(corpus)))
    return DataConfig(
        **{"path": "unused", "sources": sources, "sequence_length": 16, "validation_fraction": 0.0} | changes
    )


def test_the_counts_of_bytes():
    found = fertility(ByteTokenizer(), "mine", ["naïve café\n", "", "a b"])
    assert found == Fertility(source="mine", documents=3, bytes=16, words=4, tokens=16, fallback_tokens=4)
    assert (found.bytes_per_token, found.tokens_per_word, found.fallback_share) == (1.0, 4.0, 0.25)


def test_the_counts_of_a_trained_model(model_bytes):
    tokenizer = SentencePieceTokenizer(model_bytes, "test")
    text = "    return total\n日"
    found = fertility(tokenizer, "mine", [text])
    pieces = [tokenizer._processor.id_to_piece(token) for token in tokenizer.encode(text)]
    assert found.tokens == len(pieces)
    assert found.fallback_tokens == sum(piece.startswith("<0x") for piece in pieces) == 3
    assert found.words == 3


def test_each_source_has_a_row_and_the_last_is_all_of_them(corpus):
    code, prose, everything = report_fertility(ByteTokenizer(), config(corpus), 1 << 20)
    assert (code.documents, prose.documents, everything.documents) == (24, 6, 30)
    assert code.fallback_tokens == 0 < prose.fallback_tokens == everything.fallback_tokens
    assert everything.bytes == code.bytes + prose.bytes
    assert code.source == prose.source == str(corpus)


def test_a_source_gives_no_more_than_the_sample_and_the_same_each_time(corpus):
    found = report_fertility(ByteTokenizer(), config(corpus), 100)
    assert [row.bytes for row in found] == [100, 100, 200]
    assert found == report_fertility(ByteTokenizer(), config(corpus), 100)
    assert found != report_fertility(ByteTokenizer(), config(corpus), 99)


def test_a_named_source_goes_by_its_name(corpus):
    sources = (FilesSource(path=str(corpus), name="prose"),)
    assert report_fertility(ByteTokenizer(), config(corpus, sources=sources), 100)[0].source == "prose"


def test_a_source_without_text_has_no_ratios_and_none_at_all_is_refused(corpus, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    empty = FilesSource(path=str(tmp_path / "empty.txt"))
    row = report_fertility(ByteTokenizer(), config(corpus, sources=(empty, FilesSource(path=str(corpus)))), 100)[0]
    assert (row.bytes_per_token, row.tokens_per_word, row.fallback_share) == (None, None, None)
    with pytest.raises(InputError, match="no text in 1 files"):
        report_fertility(ByteTokenizer(), config(corpus, sources=(empty,)), 100)
