"""The part of the preparation that runs in many processes: from a part of the corpus to its documents' tokens."""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lmjax.data.clean import clean
from lmjax.data.config import DataConfig
from lmjax.data.files import replace
from lmjax.data.shards import token_dtype
from lmjax.data.sources import Part, Reading, read_part
from lmjax.data.tokenizer import Bytes, Tokenizer, read_sentencepiece

DIGEST_BYTES = 16
TEXTS_AT_ONCE = 64
"""Documents that are tokenized in one call."""


@dataclasses.dataclass(frozen=True)
class PartJob:
    """What a process needs to make one part."""

    part: Part
    config: DataConfig
    tokenizer_file: str | None
    """A SentencePiece model; None for bytes."""
    output: str


@dataclasses.dataclass(frozen=True)
class MadePart:
    """The documents of a part, in order."""

    digests: np.ndarray
    """uint8 (documents, 16): BLAKE2b of the cleaned text."""
    lengths: np.ndarray
    """int64 (documents,): tokens, BOS and EOS included."""
    tokens: np.ndarray
    """All of them, one document after the other."""
    num_empty: int
    """Documents without any text, which are not among these."""
    skipped: list[str]
    """Files that are not text."""

    def documents(self) -> Iterator[np.ndarray]:
        """The tokens of each document."""
        ends = np.cumsum(self.lengths)
        for start, end in zip((ends - self.lengths).tolist(), ends.tolist(), strict=True):
            yield self.tokens[start:end]


def make_part(job: PartJob) -> None:
    """Read, clean, digest and tokenize a part, and write it whole to ``job.output``."""
    tokenizer = _tokenizer(job.tokenizer_file)
    dtype = np.dtype(token_dtype(tokenizer.vocab_size)).newbyteorder("<")
    reading = Reading()
    digests: list[bytes] = []
    tokens: list[np.ndarray] = []
    num_empty = 0
    repair = job.config.repair_prose and job.part.repairable
    texts = (clean(text, unicode_form=job.config.unicode_form, repair=repair) for text in read_part(job.part, reading))
    while batch := list(itertools.islice(texts, TEXTS_AT_ONCE)):
        kept = [text for text in batch if text.strip()]
        num_empty += len(batch) - len(kept)
        digests += [hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest() for text in kept]
        before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        tokens += [np.array(before + ids + after, dtype) for ids in tokenizer.encode_batch(kept)]
    arrays = {
        "digests": np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES),
        "lengths": np.array([len(document) for document in tokens], np.int64),
        "tokens": np.concatenate(tokens) if tokens else np.zeros(0, dtype),
        "notes": np.frombuffer(json.dumps([num_empty, reading.skipped]).encode(), np.uint8),
    }
    replace(Path(job.output), lambda file: np.savez(file, **arrays))


def load_part(path: Path) -> MadePart:
    with np.load(path) as arrays:
        num_empty, skipped = json.loads(arrays["notes"].tobytes())
        return MadePart(arrays["digests"], arrays["lengths"], arrays["tokens"], num_empty, skipped)


def load_digests(path: Path) -> np.ndarray:
    """The digests alone: what the search for duplicates reads."""
    with np.load(path) as arrays:
        return arrays["digests"]


@functools.lru_cache(maxsize=1)
def _tokenizer(file: str | None) -> Tokenizer:
    return Bytes() if file is None else read_sentencepiece(Path(file))
