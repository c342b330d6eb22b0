"""Datasets made from tokens, without text or tokenizer training."""

import numpy as np
import pytest

from lmjax.data.index import Index, ShardEntry, TokenizerEntry, write_index
from lmjax.data.shards import shard_file, write_shard
from lmjax.data.tokenizer import ByteTokenizer

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
