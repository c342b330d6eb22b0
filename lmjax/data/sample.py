"""A deterministic sample of a corpus, and the tokenizer that is trained on it."""

import hashlib
from collections.abc import Iterator

from lmjax.data.clean import clean
from lmjax.data.config import DataConfig
from lmjax.data.sources import Reading, find_parts, read_part
from lmjax.data.tokenizer import SentencePiece, SentencePieceTraining, train_sentencepiece


def sample_texts(config: DataConfig, num_bytes: int) -> Iterator[str]:
    """Cleaned documents of about ``num_bytes`` in all: the same ones whatever the number of workers.

    Each part gives documents from its start, up to its share of the sample; which of them come first is drawn by a
    digest, so that a small sample is not the first source alone.
    """
    parts = find_parts(config)
    order = sorted(range(len(parts)), key=lambda number: hashlib.sha256(b"%d" % number).digest())
    share = -(-num_bytes // len(parts))
    left = num_bytes
    for number in order:
        of_part = min(share, left)
        for text in read_part(parts[number], Reading()):
            if of_part <= 0:
                break
            text = clean(text, unicode_form=config.unicode_form, repair=config.repair_prose and parts[number].repairable)
            size = len(text.encode())
            of_part -= size
            left -= size
            yield text
        if left <= 0:
            return


def train_tokenizer(data: DataConfig, tokenizer: SentencePieceTraining) -> SentencePiece:
    """The SentencePiece model of ``tokenizer`` on a sample of ``data``'s sources. Raises InputError where it cannot be."""
    return train_sentencepiece(tokenizer, sample_texts(data, tokenizer.sample_bytes))
