"""The sample of the sources that a tokenizer is trained on, and its training."""

import hashlib
import io
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

from lmjax.data.clean import clean
from lmjax.data.config import DataConfig
from lmjax.data.files import write_bytes
from lmjax.data.index import SkippedInput
from lmjax.data.input_files import InputFile
from lmjax.data.parts import digest_of, split_of
from lmjax.data.sources import Piece, cut, list_files, read_texts
from lmjax.data.tokenizer import SentencePieceTrained, TokenizerConfig, load_tokenizer
from lmjax.data.tokenizer_sentencepiece import SPACE_MARK, SentencePieceTokenizer
from lmjax.errors import InputError

PIECE_BYTES = 2**20
"""A jsonl file gives its lines to the sample by so many bytes."""
SENTENCE_CHARACTERS = 2**12
"""The trainer takes texts in parts of about this size."""
_RESERVED = re.compile(f"[{SPACE_MARK}\u2585]")
"""To the trainer the one is a space and the other makes a whole part unfit; as tokens both are bytes."""


def train_tokenizer(data: DataConfig, tokenizer: TokenizerConfig, path: str | Path) -> SentencePieceTokenizer:
    """Train a config's tokenizer on its sources and write the model to ``path``, which must not be there yet.

    Raises InputError for a tokenizer that is not trained, a vocabulary that the text does not fit, and a path that
    cannot be written.
    """
    path = Path(path)
    if not isinstance(tokenizer, SentencePieceTrained):
        raise InputError(f"tokenizer.kind is {tokenizer.kind}, which is not trained; allowed: sentencepiece")
    if path.exists():
        raise InputError(f"{path}: there is a file already, and it stays as it is; choose another name")
    model = train_model(tokenizer, sample_texts(list_files(data.sources), data, tokenizer.sample_bytes))
    write_bytes(path, model)
    trained = load_tokenizer(path)
    assert isinstance(trained, SentencePieceTokenizer)
    return trained


def sample_texts(files: Sequence[InputFile], data: DataConfig, sample_bytes: int) -> list[str]:
    """Cleaned documents of the training split, each once, up to ``sample_bytes`` of UTF-8.

    Files, and pieces of jsonl files, come in the order of a hash of their names, so that a small sample is not the
    first source alone; it is the same on every machine.
    """
    texts = list(sampled_texts(files, data, sample_bytes))
    if not texts:
        raise InputError(
            f"data.sources: no text to train a tokenizer on in {len(files)} files: they are empty, not UTF-8, or fell "
            "in the validation split; give files with text, encoded as UTF-8"
        )
    return texts


def sampled_texts(files: Sequence[InputFile], data: DataConfig, sample_bytes: int) -> Iterator[str]:
    """The texts of ``sample_texts``, one after the other; none where there are none."""
    seen = set()
    left = sample_bytes
    for piece in _shuffled(files):
        for found in read_texts(piece):
            if isinstance(found, SkippedInput):
                continue
            text = clean(found, normalize=data.normalize, repair=data.ftfy and piece.file.content == "prose")
            digest = digest_of(text)
            if not text.strip() or digest in seen or split_of(digest, data.validation_fraction) != "train":
                continue
            seen.add(digest)
            content = text.encode()
            left -= len(content)
            if left <= 0:
                yield content[: len(content) + left].decode(errors="ignore")
                return
            yield text


def train_model(config: SentencePieceTrained, texts: Sequence[str]) -> bytes:
    """The content of a .model file that encodes any text without loss, with runs of spaces as tokens.

    A pure function of its arguments. Raises InputError for a vocabulary that is too large or too small for the text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            byte_fallback=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=2**30,
            num_threads=1,
            minloglevel=4,
        )
    except RuntimeError as error:
        raise InputError(_misfit(config.vocab_size, sum(len(text.encode()) for text in texts), str(error))) from error
    return model.getvalue()


def _misfit(vocab_size: int, num_bytes: int, message: str) -> str:
    """The trainer's complaint in our words."""
    where = f"tokenizer.vocab_size is {vocab_size}, and its sample has {num_bytes} bytes of text"
    if most := re.search(r"value <= (\d+)", message):
        return f"{where}, which give at most {most[1]} tokens; lower it, or give more text"
    if least := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"{where} with so many different characters that {least[1]} tokens are taken; raise it above that"
    return f"{where}, on which SentencePiece cannot be trained: {message}"


def _shuffled(files: Sequence[InputFile]) -> Iterator[Piece]:
    # Of each piece its place, and where it is, in one object: there may be millions.
    places = sorted(
        _place(piece) + struct.pack(">QQ", number, piece.start)
        for number, file in enumerate(files)
        for piece in cut([file], PIECE_BYTES)
    )
    for place in places:
        number, start = struct.unpack(">QQ", place[-16:])
        yield next(cut([files[number]], PIECE_BYTES, start))


def _place(piece: Piece) -> bytes:
    return hashlib.sha256(f"{piece.file.source} {piece.start} {piece.file.name}".encode()).digest()


def _sentences(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        for part in _RESERVED.split(text):
            start = 0
            while start < len(part):
                end = part.find("\n", start + SENTENCE_CHARACTERS) + 1 or len(part)
                yield part[start:end]
                start = end
