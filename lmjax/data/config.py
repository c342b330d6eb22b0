"""What a dataset is made of, and how it is cut into rows."""

from typing import Annotated, Literal

import pydantic

from lmjax.schema import UserPath, config_class

Content = Literal["prose", "code"]


@config_class
class FilesSource:
    """Text files; each one is a document."""

    kind: Literal["files"] = "files"
    """Which class of source this is."""
    path: UserPath
    """A file, a directory that is searched to the bottom (hidden ones left out), or a glob such as src/**/*.c."""
    content: Content = "prose"
    """Prose may be repaired by ftfy; code is kept as it is."""
    extensions: tuple[str, ...] | None = None
    """Which files of a directory are taken, such as .txt; null takes the usual ones for this content."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; name a file, a directory or a glob")
        if self.extensions is not None:
            if not self.extensions:
                raise ValueError("extensions is empty, so that no file fits; name some, or leave it out")
            for extension in self.extensions:
                if not extension.startswith(".") or len(extension) < 2:
                    raise ValueError(f"extensions: found {extension!r}; an extension begins with a dot, such as .txt")


@config_class
class JsonlSource:
    """Files with one JSON object a line; each line is a document."""

    kind: Literal["jsonl"] = "jsonl"
    """Which class of source this is."""
    path: UserPath
    """A file, a directory (its .jsonl files, to the bottom), or a glob."""
    content: Content = "prose"
    """Prose may be repaired by ftfy; code is kept as it is."""
    text_field: str = "text"
    """Key of an object under which its text is."""

    def __post_init__(self) -> None:
        for name in ("path", "text_field"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")


@config_class
class StdlibSource:
    """The standard library of the running Python: its .py files as code, its .rst, .txt and .md files as prose.

    Its tests, its tables of character encodings and what was installed beside it are left out. About 11 MB; it
    differs between versions of Python.
    """

    kind: Literal["stdlib"] = "stdlib"
    """Which class of source this is."""


Source = Annotated[FilesSource | JsonlSource | StdlibSource, pydantic.Field(discriminator="kind")]


@config_class
class DataConfig:
    """From text to rows of tokens."""

    path: UserPath
    """Directory of the prepared dataset."""
    sources: tuple[Source, ...]
    """Where the text comes from, in this order; of equal documents the first one is kept."""
    normalize: Literal["NFC", "NFKC"] | None = "NFC"
    """Unicode form of every document; null keeps the form that it has."""
    ftfy: bool = True
    """Repair prose that was decoded wrongly somewhere (ftfy); code is never touched."""
    validation_fraction: float = 0.01
    """Part of the documents that is held out, chosen by a hash of the text; 0 holds none out."""
    shard_bytes: int = 256 * 2**20
    """Bytes of tokens at which a shard is full."""
    num_workers: int | None = None
    """Processes that prepare; null is one a CPU core. The dataset does not depend on it."""
    sequence_length: int
    """Tokens a row."""
    packing: Literal["best_fit", "concat"] = "best_fit"
    """How documents fill rows: best-fit decreasing, which cuts only what is longer than a row, or one stream, cut."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty; name a directory, as data/mine")
        if not self.sources:
            raise ValueError("sources is empty; name at least one, as [{kind: files, path: texts}]")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; it has to be at least 0 and below 1")
        for name, least in (("shard_bytes", 1), ("num_workers", 1), ("sequence_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it has to be {least} or more")
        if not self.ftfy and all(getattr(source, "content", "prose") == "code" for source in self.sources):
            raise ValueError("ftfy=false changes nothing, since no source has prose: leave it at its default, true")
