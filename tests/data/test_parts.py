"""Parts: each document's tokens, split and digest depend on its text alone."""

from pathlib import Path

import numpy as np
import pytest

from lmjax.data import parts
from lmjax.data.config import FilesSource
from lmjax.data.parts import (
    Parts,
    Recipe,
    digest_of,
    encode_documents,
    make_part,
    read_splits,
    read_sums,
    read_tokens,
    split_of,
)
from lmjax.data.sources import cut, list_files
from lmjax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer

pytestmark = pytest.mark.fast


@pytest.fixture
def recipe(tmp_path):
    tokenizer = ByteTokenizer()
    tokenizer.save(tmp_path)
    return Recipe(
        normalize="NFC",
        ftfy=True,
        validation_fraction=0.25,
        tokenizer=str(tmp_path / tokenizer.file),
        fingerprint=tokenizer.fingerprint,
        dtype="uint16",
    )


@pytest.fixture
def files(corpus):
    return list_files([FilesSource(path=str(corpus), content="code"), FilesSource(path=str(corpus))])


def test_a_document_is_bos_its_tokens_and_eos(model_bytes):
    for tokenizer in (ByteTokenizer(), SentencePieceTokenizer(model_bytes, "test")):
        texts = ["def f", "", "a▁b"]
        flat, lengths = encode_documents(tokenizer, texts, "uint16")
        expected = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
        assert flat.dtype == np.uint16
        assert flat.tolist() == [token for tokens in expected for token in tokens]
        assert lengths == [len(tokens) for tokens in expected]


def test_a_part_of_tiny_files_has_so_many_at_most(files, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "MAX_PIECES", 2)
    assert {part.num_pieces for part in Parts(files, recipe, tmp_path).parts} == {1, 2}


@pytest.mark.parametrize("batch_characters", [1, 300, 1 << 20])
@pytest.mark.parametrize("part_bytes", [1, 700, 1 << 20])
def test_parts_hold_all_documents_in_order_however_they_are_cut(
    files, recipe, tmp_path, monkeypatch, batch_characters, part_bytes
):
    monkeypatch.setattr(parts, "BATCH_CHARACTERS", batch_characters)
    monkeypatch.setattr(parts, "MIN_PART_BYTES", part_bytes)
    work = Parts(files, recipe, tmp_path)
    jobs = [work.job(part) for part in work.parts]
    assert [piece for job in jobs for piece in job.pieces] == list(cut(files, max(part_bytes, 1)))
    assert (len(jobs) == 2) == (part_bytes == 1 << 20), "one of each source"
    found = {"train": [], "validation": []}
    sums = [make_part(job) for job in jobs]
    assert sums == [read_sums(job.path) for job in jobs]
    for job in jobs:
        for split, texts in found.items():
            digests, lengths = read_splits(job.path)[split]
            starts = np.cumsum(lengths) - lengths
            tokens, lengths_again = read_tokens(job.path, split)
            assert lengths_again.tolist() == lengths.tolist()
            for digest, start, length in zip(digests, starts, lengths, strict=True):
                text = ByteTokenizer().decode(tokens[start : start + length].tolist())
                assert digest.tobytes() == digest_of(text)
                texts.append(text)
    contents = [Path(file.path).read_text() for file in files if file.name not in ("latin.md", "empty.md")]
    for split, texts in found.items():
        assert texts == [text for text in contents if split_of(digest_of(text), 0.25) == split]
        assert texts
    assert sum(part.documents for part in sums) == len(contents)
    assert sum(part.empty for part in sums) == 1
    assert [skip.name for part in sums for skip in part.skipped] == ["latin.md"]


def test_the_key_of_a_part_follows_all_that_it_depends_on(files, recipe, tmp_path):
    def keys(files, recipe):
        return [part.key for part in Parts(files, recipe, tmp_path).parts]

    before = keys(files, recipe)
    moved = [file._replace(path=f"/elsewhere{file.path}") for file in files]
    assert keys(moved, recipe._replace(tokenizer="/elsewhere")) == before
    for change in ({"ftfy": False}, {"normalize": None}, {"fingerprint": "0"}, {"validation_fraction": 0.5}):
        assert keys(files, recipe._replace(**change)) != before
    for change in ({"size": 9}, {"mtime_ns": 9}, {"name": "other"}, {"content": "prose"}):
        assert keys([files[0]._replace(**change), *files[1:]], recipe) != before


def test_the_validation_fraction_is_kept_and_raising_it_only_adds():
    digests = [digest_of(f"document {number}") for number in range(4000)]
    held_out = {fraction: {d for d in digests if split_of(d, fraction) == "validation"} for fraction in (0, 0.1, 0.5)}
    assert not held_out[0]
    assert 300 < len(held_out[0.1]) < 500
    assert 1800 < len(held_out[0.5]) < 2200
    assert held_out[0.1] < held_out[0.5]
