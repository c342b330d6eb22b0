"""How many tokens a tokenizer needs for a text, by source: fertility."""

import dataclasses
from collections.abc import Iterable, Sequence

from lmjax.data.config import DataConfig
from lmjax.data.input_files import InputFiles
from lmjax.data.sample import sampled_texts
from lmjax.data.sources import list_files
from lmjax.data.tokenizer import Tokenizer
from lmjax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fertility:
    """Counts of one source's sample, without BOS and EOS."""

    source: str
    documents: int
    bytes: int
    """Of UTF-8."""
    words: int
    """Between white space."""
    tokens: int
    fallback_tokens: int
    """Bytes that are not a character, and unknown ones."""

    @property
    def bytes_per_token(self) -> float | None:
        """None without tokens; so it is with the next two without what they divide by."""
        return self.bytes / self.tokens if self.tokens else None

    @property
    def tokens_per_word(self) -> float | None:
        """How many tokens a word takes; white space counts with the words."""
        return self.tokens / self.words if self.words else None

    @property
    def fallback_share(self) -> float | None:
        """Part of the tokens for which the vocabulary has no character."""
        return self.fallback_tokens / self.tokens if self.tokens else None


def fertility(tokenizer: Tokenizer, source: str, texts: Iterable[str]) -> Fertility:
    """Count the tokens of some texts."""
    fallback_ids = tokenizer.fallback_ids()
    documents = num_bytes = words = num_tokens = fallback = 0
    for text in texts:
        tokens = tokenizer.encode(text)
        documents += 1
        num_bytes += len(text.encode())
        words += len(text.split())
        num_tokens += len(tokens)
        fallback += sum(token in fallback_ids for token in tokens)
    return Fertility(
        source=source, documents=documents, bytes=num_bytes, words=words, tokens=num_tokens, fallback_tokens=fallback
    )


def report_fertility(tokenizer: Tokenizer, data: DataConfig, sample_bytes: int) -> list[Fertility]:
    """Fertility on up to ``sample_bytes`` of each source, cleaned as for a dataset, and then on all samples together.

    The sample is a pure function of the sources. Raises InputError where no source has text.
    """
    files = list_files(data.sources)
    rows = []
    for number, source in enumerate(data.sources):
        of_source = InputFiles(file for file in files if file.source == number)
        texts = sampled_texts(of_source, data, sample_bytes)
        rows.append(fertility(tokenizer, source.name or getattr(source, "path", source.kind), texts))
    if not any(row.documents for row in rows):
        raise InputError(f"no text in {len(files)} files: they are empty, or not UTF-8; give files with text")
    return [*rows, _together(rows)]


def _together(rows: Sequence[Fertility]) -> Fertility:
    names = ("documents", "bytes", "words", "tokens", "fallback_tokens")
    return Fertility(source="all", **{name: sum(getattr(row, name) for row in rows) for name in names})
