"""The work of one process: from a part of the sources to a file with its documents' digests and tokens."""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lmjax.data.clean import clean
from lmjax.data.files import replacing
from lmjax.data.index import SkippedInput
from lmjax.data.input_files import InputFile
from lmjax.data.sources import Piece, cut, read_texts
from lmjax.data.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "validation")
DIGEST_BYTES = 16
BATCH_CHARACTERS = 2**19
"""Text that is tokenized in one call: its tokens are Python integers for a moment, of 36 bytes each."""
MIN_PART_BYTES, MAX_PART_BYTES = 2**19, 2**23
PARTS = 256
"""Into about so many parts sources are cut, within the bounds on a part's bytes."""
MAX_PIECES = 2**12
"""How many pieces a part has at most, however small they are."""
VOLUME_CHARACTERS = 2**25
"""Text after which the documents of a part go on in another file: one piece may be an archive of any size."""
MAX_NAMED = 100
"""How many skipped inputs are named; all are counted."""


class Recipe(NamedTuple):
    """What a document's tokens, and the split that it falls in, depend on besides its text."""

    normalize: Literal["NFC", "NFKC"] | None
    ftfy: bool
    validation_fraction: float
    tokenizer: str
    """Its file."""
    fingerprint: str
    """Of the tokenizer."""
    dtype: Literal["uint16", "uint32"]
    """Of tokens."""


class Part(NamedTuple):
    """Some pieces of one source that one process works on, told without naming them all."""

    first: int
    """Place of the file in which it begins, among all files."""
    start: int
    """Where in that file its first piece begins."""
    num_pieces: int
    num_bytes: int
    """Of the files, as they are stored."""
    source: int
    """Place of the source in the config."""
    key: str
    """Digest of all that the result depends on; files count by name, size and time."""
    path: str
    """Where the result goes."""


class PartJob(NamedTuple):
    """What it takes to make a part."""

    pieces: tuple[Piece, ...]
    recipe: Recipe
    key: str
    """Of the part."""
    path: str
    """Where the result goes."""


class PartSums(NamedTuple):
    """What is in a finished part."""

    documents: int
    tokens: int
    empty: int
    """Documents with nothing but whitespace."""
    num_skipped: int
    """Files, or lines of files, that could not be read as text."""
    skipped: tuple[SkippedInput, ...]
    """The first of them."""
    volumes: int = 1
    """Files that hold the documents."""


class SplitOfPart(NamedTuple):
    """The documents of a volume that fall in one split, in their order."""

    digests: np.ndarray
    """uint8 [documents, 16]: BLAKE2b of the cleaned text."""
    lengths: np.ndarray
    """int64 [documents]: tokens, with BOS and EOS."""


class Volume(NamedTuple):
    """A file with documents of a part."""

    path: str
    key: str
    """Digest of all that its content depends on."""
    splits: dict[str, SplitOfPart]
    source: str | None = None
    """The name of the source that they are of; None where sources have none."""


class Parts:
    """All the work, in the order of the sources, the same however many processes do it.

    There may be as many files as there are documents: pieces are made anew where they are needed.
    """

    def __init__(self, files: Sequence[InputFile], recipe: Recipe, directory: Path):
        self._files, self._recipe, self._directory = files, recipe, directory
        self._size = min(max(sum(file.size for file in files) // PARTS, MIN_PART_BYTES), MAX_PART_BYTES)
        self.parts = list(self._find_parts())

    def job(self, part: Part) -> PartJob:
        files = (self._files[number] for number in range(part.first, len(self._files)))
        pieces = itertools.islice(cut(files, self._size, part.start), part.num_pieces)
        return PartJob(tuple(pieces), self._recipe, part.key, part.path)

    def _find_parts(self) -> Iterator[Part]:
        pieces: list[Piece] = []
        filled = first = 0
        for number, file in enumerate(self._files):
            for piece in cut([file], self._size):
                size = piece.stop - piece.start
                full = filled + size > self._size or len(pieces) == MAX_PIECES
                if pieces and (full or file.source != pieces[0].file.source):
                    yield self._part(first, pieces)
                    pieces, filled = [], 0
                if not pieces:
                    first = number
                pieces.append(piece)
                filled += size
        if pieces:
            yield self._part(first, pieces)

    def _part(self, first: int, pieces: list[Piece]) -> Part:
        known = [(piece.file._replace(path=""), piece.start, piece.stop) for piece in pieces]
        key = hashlib.sha256(json.dumps([self._recipe._replace(tokenizer=""), known]).encode()).hexdigest()
        return Part(
            first=first,
            start=pieces[0].start,
            num_pieces=len(pieces),
            num_bytes=sum(piece.stop - piece.start for piece in pieces),
            source=pieces[0].file.source,
            key=key,
            path=str(self._directory / f"{key}.npz"),
        )


def make_part(job: PartJob) -> PartSums:
    """Read, clean, split and tokenize the pieces of a job; the file that stands for the part is written last."""
    recipe = job.recipe
    tokenizer = _tokenizer(recipe.tokenizer, recipe.fingerprint)
    texts = _Texts(job)
    held = _Held(recipe.dtype)
    documents = tokens = volumes = 0
    for batch in _batches(texts):
        if held.characters >= VOLUME_CHARACTERS:
            _write(_volume(job, volumes)[0], held, {})
            held = _Held(recipe.dtype)
            volumes += 1
        for split, batch_digests, batch_texts in _by_split(batch, recipe.validation_fraction):
            flat, lengths = encode_documents(tokenizer, batch_texts, recipe.dtype)
            # A model from elsewhere may normalize a whole text away.
            full = [number for number, length in enumerate(lengths) if length]
            texts.empty += len(lengths) - len(full)
            held.add(split, [batch_digests[number] for number in full], [lengths[number] for number in full], flat)
            documents += len(full)
            tokens += len(flat)
        held.characters += sum(map(len, batch))
    sums = PartSums(documents, tokens, texts.empty, texts.num_skipped, tuple(texts.skipped), volumes + 1)
    _write(job.path, held, {**sums._asdict(), "skipped": [(found.name, found.reason) for found in sums.skipped]})
    return sums


class _Held:
    """Documents of both splits that were not written yet."""

    def __init__(self, dtype: str):
        self.characters = 0
        self._digests: dict[str, list[bytes]] = {split: [] for split in SPLITS}
        self._lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
        self._tokens = {split: [np.empty(0, dtype)] for split in SPLITS}

    def add(self, split: str, digests: list[bytes], lengths: list[int], tokens: np.ndarray) -> None:
        self._digests[split] += digests
        self._lengths[split] += lengths
        self._tokens[split].append(tokens)

    def arrays(self) -> dict[str, np.ndarray]:
        found = {}
        for split in SPLITS:
            digests = np.frombuffer(b"".join(self._digests[split]), np.uint8)
            found[f"{split}_digests"] = digests.reshape(-1, DIGEST_BYTES)
            found[f"{split}_lengths"] = np.array(self._lengths[split], np.int64)
            found[f"{split}_tokens"] = np.concatenate(self._tokens[split])
        return found


def _write(path: str, held: _Held, notes: dict[str, Any]) -> None:
    arrays: dict[str, Any] = {"notes": np.frombuffer(json.dumps(notes).encode(), np.uint8), **held.arrays()}
    with replacing(Path(path)) as unfinished, unfinished.open("wb") as file:
        np.savez(file, **arrays)


def read_volumes(part: Part, count: int, source: str | None) -> list[Volume]:
    """The ``count`` files of a finished part, in the order of its documents; tokens are left where they are."""
    names = [*(_volume(part, number) for number in range(count - 1)), (part.path, part.key)]
    return [Volume(path, key, read_splits(path), source) for path, key in names]


def _volume(part: Part | PartJob, number: int) -> tuple[str, str]:
    """Path and key of one of those before the last, which stands for the part."""
    return f"{part.path.removesuffix('.npz')}.{number}.npz", f"{part.key}.{number}"


def read_sums(path: str) -> PartSums:
    """What is in the part that is stored there."""
    with np.load(path) as part:
        notes = json.loads(part["notes"].tobytes())
    skipped = tuple(SkippedInput(name=name, reason=reason) for name, reason in notes.pop("skipped"))
    return PartSums(**notes, skipped=skipped)


def read_splits(path: str) -> dict[str, SplitOfPart]:
    """Digests and lengths of the documents, by split; the tokens are left where they are."""
    with np.load(path) as part:
        return {split: SplitOfPart(part[f"{split}_digests"], part[f"{split}_lengths"]) for split in SPLITS}


def read_tokens(path: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a split's documents, one after the other; and how many each has."""
    with np.load(path) as part:
        return part[f"{split}_tokens"], part[f"{split}_lengths"]


def digest_of(text: str) -> bytes:
    """The 16 bytes by which documents are told apart."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def split_of(digest: bytes, validation_fraction: float) -> str:
    """The split of a document: it depends on its text alone, so that it stays when documents are added."""
    place = int.from_bytes(digest[:8], "big") / 2.0**64
    return SPLITS[place < validation_fraction]


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str], dtype: str) -> tuple[np.ndarray, list[int]]:
    """Tokens of all texts, one after the other, each with BOS before and EOS after it; and how many each has."""
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    encoded = tokenizer.encode_batch(texts)
    flat = itertools.chain.from_iterable(part for tokens in encoded for part in (before, tokens, after))
    lengths = [len(before) + len(tokens) + len(after) for tokens in encoded]
    return np.fromiter(flat, dtype, count=sum(lengths)), lengths


class _Texts:
    """The cleaned texts of a job; what is not among them is counted."""

    def __init__(self, job: PartJob):
        self.empty = 0
        self.num_skipped = 0
        self.skipped: list[SkippedInput] = []
        self._job = job

    def __iter__(self) -> Iterator[str]:
        recipe = self._job.recipe
        for piece in self._job.pieces:
            repair = recipe.ftfy and piece.file.content == "prose"
            for found in read_texts(piece):
                if isinstance(found, SkippedInput):
                    self.num_skipped += 1
                    if len(self.skipped) < MAX_NAMED:
                        self.skipped.append(found)
                    continue
                text = clean(found, normalize=recipe.normalize, repair=repair)
                if text.isspace() or not text:
                    self.empty += 1
                else:
                    yield text


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _by_split(texts: list[str], validation_fraction: float) -> Iterator[tuple[str, list[bytes], list[str]]]:
    digests = [digest_of(text) for text in texts]
    splits = [split_of(digest, validation_fraction) for digest in digests]
    for split in SPLITS:
        here = [number for number, found in enumerate(splits) if found == split]
        yield split, [digests[number] for number in here], [texts[number] for number in here]


@functools.lru_cache(maxsize=1)
def _tokenizer(file: str, fingerprint: str) -> Tokenizer:
    tokenizer = load_tokenizer(file)
    assert tokenizer.fingerprint == fingerprint
    return tokenizer
