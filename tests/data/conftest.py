"""Datasets made from tokens, a small corpus, and a small tokenizer."""

import contextlib
import resource
import sys

import numpy as np
import pytest

from lmjax.data.index import Index, ShardEntry, TokenizerEntry, write_index
from lmjax.data.sample import train_model
from lmjax.data.shards import shard_file, write_shard
from lmjax.data.tokenizer import ByteTokenizer, SentencePieceTrained

VOCAB_SIZE = 4096


@pytest.fixture
def make_dataset(tmp_path):
    """``make(name="dataset", documents_per_shard=None, train=[...], validation=[...])`` writes a dataset of these
    documents (integers, [length] each) and returns its directory and index. A split without documents has no shard.
    """

    def make(name: str = "dataset", documents_per_shard: int | None = None, **splits: list[np.ndarray]):
        directory = tmp_path / name
        directory.mkdir()
        shards = []
        counts = np.zeros(VOCAB_SIZE, np.int64)
        for split, documents in splits.items():
            size = documents_per_shard or max(len(documents), 1)
            pieces = [documents[start : start + size] for start in range(0, len(documents), size)]
            for number, piece in enumerate(pieces):
                file = shard_file(split, number, len(pieces))
                shards.append(
                    ShardEntry(file=file, split=split, **write_shard(directory / file, piece, "uint16")._asdict())
                )
            if split == "train":
                for document in documents:
                    counts += np.bincount(document[1:], minlength=VOCAB_SIZE)
        tokenizer = ByteTokenizer()
        entry = TokenizerEntry(
            kind=tokenizer.kind,
            file=tokenizer.save(directory),
            fingerprint=tokenizer.fingerprint,
            vocab_size=VOCAB_SIZE,
            bos_id=None,
            eos_id=None,
        )
        index = Index(tokenizer=entry, token_dtype="uint16", shards=tuple(shards), token_counts=tuple(counts.tolist()))
        write_index(directory, index)
        return str(directory), index

    return make


def code(number: int) -> str:
    """A little program, another one for every number."""
    return (
        f"def function_{number}(value, other):\n"
        f"    total = {number * 7919}\n"
        f"    for index in range({number}):\n"
        "        if value > other:\n"
        "            total += value * index\n\n"
        "    return total\n"
    )


@pytest.fixture(scope="session")
def model_bytes() -> bytes:
    """A SentencePiece model of 400 tokens, trained on little programs and a sentence."""
    texts = [code(number) for number in range(40)] + ["The quick brown fox — naïve café — jumps.\n" * 20]
    return train_model(SentencePieceTrained(vocab_size=400), texts)


@pytest.fixture
def corpus(tmp_path):
    """A directory of 24 little programs and 6 texts; one program is there twice, one text is empty, one is no text."""
    root = tmp_path / "corpus"
    (root / "inner").mkdir(parents=True)
    for number in range(24):
        (root / "inner" / f"{number:02d}.py").write_text(code(number))
    (root / "copy.py").write_text(code(7))
    for number in range(6):
        (root / f"{number}.md").write_text(f"# Chapter {number}\n\nThe café number {number} is open.\n")
    (root / "empty.md").write_text(" \n\t\n")
    (root / "latin.md").write_bytes("Ein Satz in Latin-1: Größe.".encode("latin-1"))
    return root


@pytest.fixture
def file_size_limit(monkeypatch):
    """``with file_size_limit(num_bytes):`` is a disk that is full: no file may grow beyond this."""
    # Python leaves half a .pyc behind where it cannot write the whole, and later fails to import it.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    @contextlib.contextmanager
    def limited(num_bytes: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
