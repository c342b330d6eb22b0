"""What a dataset is made of, and how it is cut into rows."""

import re
from typing import Annotated, Any, Literal

import pydantic

from lmjax.data.fields import parse_template
from lmjax.data.mixture import Mixture, Stage, whole_shares
from lmjax.schema import UserPath, config_class

Content = Literal["prose", "code"]


@config_class
class NamedSource:
    """What every source may say of its part in a mixture."""

    name: str | None = None
    """Under this name the dataset keeps its documents apart; all sources have one, or none has."""
    weight: float | None = None
    """Its part of the rows of a batch, relative to the others' weights; null in all sources mixes all documents."""
    epochs: int | None = None
    """How often its rows may be seen at most; a run that would need them more often is refused. null is no limit."""

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", self.name):
            raise ValueError(f"name is {self.name!r}; it has letters, digits, - and _ alone, at most 64, as web-text")
        if self.weight is not None and self.weight < 0:
            raise ValueError(f"weight is {self.weight}; it has to be 0 or more")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs is {self.epochs}; it has to be 1 or more")


@config_class
class FilesSource(NamedSource):
    """Text files; each one is a document. One that ends in .gz or .zst is unpacked as it is read."""

    kind: Literal["files"] = "files"
    """Which class of source this is."""
    path: UserPath
    """A file, a directory that is searched to the bottom (hidden ones left out), or a glob such as src/**/*.c."""
    content: Content = "prose"
    """Prose may be repaired by ftfy; code is kept as it is."""
    extensions: tuple[str, ...] | None = None
    """Which files of a directory are taken, such as .txt; null takes the usual ones for this content."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_filled(self, "path")
        if self.extensions is not None:
            if not self.extensions:
                raise ValueError("extensions is empty, so that no file fits; name some, or leave it out")
            for extension in self.extensions:
                if not extension.startswith(".") or len(extension) < 2:
                    raise ValueError(f"extensions: found {extension!r}; an extension begins with a dot, such as .txt")


@config_class
class TableSource(NamedSource):
    """What sources with one document a row have in common."""

    path: UserPath
    """A file, a directory (its files of this kind, to the bottom), or a glob."""
    content: Content = "prose"
    """Prose may be repaired by ftfy; code is kept as it is."""
    text_field: str = "text"
    """Where a row's text is: a column, or key, or a path into nested ones such as message.content or turns.0; or a
    template that puts several together, such as "{title}\\n\\n{message.content}"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_filled(self, "path", "text_field")
        parse_template(self.text_field)


@config_class
class JsonlSource(TableSource):
    """Files with one JSON object a line (.jsonl, .jsonl.gz, .jsonl.zst); each line is a document."""

    kind: Literal["jsonl"] = "jsonl"
    """Which class of source this is."""


@config_class
class CsvSource(TableSource):
    """Files of comma-separated values (.csv, .csv.gz, .csv.zst) with a header; each row is a document."""

    kind: Literal["csv"] = "csv"
    """Which class of source this is."""
    delimiter: str = ","
    """What stands between two values, one character."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
            raise ValueError(f"delimiter is {self.delimiter!r}; it has to be one character, such as , or ;")


@config_class
class ParquetSource(TableSource):
    """Parquet files (.parquet); each row is a document."""

    kind: Literal["parquet"] = "parquet"
    """Which class of source this is."""


@config_class
class StdlibSource(NamedSource):
    """The standard library of the running Python: its .py files as code, its .rst, .txt and .md files as prose.

    Its tests, its tables of character encodings and what was installed beside it are left out. About 11 MB; it
    differs between versions of Python.
    """

    kind: Literal["stdlib"] = "stdlib"
    """Which class of source this is."""


def _check_filled(source: Any, *names: str) -> None:
    for name in names:
        if not getattr(source, name):
            raise ValueError(f"{name} is empty")


Source = Annotated[
    FilesSource | JsonlSource | CsvSource | ParquetSource | StdlibSource, pydantic.Field(discriminator="kind")
]


@config_class
class WeightsFromStep:
    """Other weights of a mixture, from some step on."""

    from_step: int
    """After so many steps these weights hold."""
    weights: dict[str, float]
    """The weight of every source, by name."""

    def __post_init__(self) -> None:
        if self.from_step < 1:
            raise ValueError(f"from_step is {self.from_step}; it has to be 1 or more: before, sources.*.weight holds")


@config_class
class DataConfig:
    """From text to rows of tokens."""

    path: UserPath
    """Directory of the prepared dataset."""
    sources: tuple[Source, ...]
    """Where the text comes from, in this order; of equal documents the first one is kept."""
    weights_by_step: tuple[WeightsFromStep, ...] = ()
    """Weights that replace those of the sources from some step on, in ascending order."""
    normalize: Literal["NFC", "NFKC"] | None = "NFC"
    """Unicode form of every document; null keeps the form that it has."""
    ftfy: bool = True
    """Repair prose that was decoded wrongly somewhere (ftfy); code is never touched."""
    validation_fraction: float = 0.01
    """Part of the documents that is held out, chosen by a hash of the text; 0 holds none out."""
    shard_bytes: int = 256 * 2**20
    """Most bytes of tokens in a shard; a dataset that would have few of these is cut into several smaller ones."""
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
        self._check_names()
        self._check_weights()
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; it has to be at least 0 and below 1")
        for name, least in (("shard_bytes", 1), ("num_workers", 1), ("sequence_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it has to be {least} or more")
        if not self.ftfy and all(getattr(source, "content", "prose") == "code" for source in self.sources):
            raise ValueError("ftfy=false changes nothing, since no source has prose: leave it at its default, true")

    @property
    def mixture(self) -> Mixture | None:
        """How the sources are mixed; None where they have no weights and all documents are one stream."""
        if self.sources[0].weight is None:
            return None
        names = tuple(str(source.name) for source in self.sources)
        first = Stage(0, tuple(float(source.weight or 0) for source in self.sources))
        later = [
            Stage(entry.from_step, tuple(float(entry.weights[name]) for name in names))
            for entry in self.weights_by_step
        ]
        return Mixture(names, tuple(source.epochs for source in self.sources), (first, *later))

    def _check_names(self) -> None:
        names = [source.name for source in self.sources]
        known = [name for name in names if name is not None]
        if known and None in names:
            raise ValueError(f"sources.{names.index(None)} has no name, but others have: name all of them, or none")
        lower = [name.lower() for name in known]
        for number, name in enumerate(lower):
            if name in lower[:number]:
                raise ValueError(f"sources.{number} has the name of another one, {known[number]}: give each its own")

    def _check_weights(self) -> None:
        weighted = [source.weight is not None for source in self.sources]
        if not any(weighted):
            for number, source in enumerate(self.sources):
                if source.epochs is not None:
                    raise ValueError(f"sources.{number} has epochs, which need weights: give every source a weight")
            if self.weights_by_step:
                raise ValueError("weights_by_step needs sources with weights to begin with: give every source a weight")
            return
        if not all(weighted):
            raise ValueError(f"sources.{weighted.index(False)} has no weight, but others have: give all of them one")
        if self.sources[0].name is None:
            raise ValueError("sources have weights and no names: give every source a name")
        names = [source.name for source in self.sources]
        before = 0
        for number, entry in enumerate(self.weights_by_step):
            if entry.from_step <= before:
                raise ValueError(f"weights_by_step.{number} is from step {entry.from_step}, not after step {before}")
            before = entry.from_step
            if sorted(entry.weights) != sorted(map(str, names)):
                raise ValueError(
                    f"weights_by_step.{number} has weights for {', '.join(sorted(entry.weights))}; it has to have one "
                    f"for each of {', '.join(map(str, names))}"
                )
        assert self.mixture is not None
        for number, stage in enumerate(self.mixture.stages):
            try:
                whole_shares(stage.weights)
            except ValueError as error:
                where = "sources" if number == 0 else f"weights_by_step.{number - 1}"
                raise ValueError(f"{where}: {error}") from None
