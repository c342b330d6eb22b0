"""The files of all sources, held so that a corpus of millions of them can be listed in little memory."""

from array import array
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, overload

from lmjax.data.archives import is_archive
from lmjax.data.config import Content

_STORED = ("utf-8", "surrogateescape")
"""Encodes the names that a disk can have, those that are no UTF-8 too."""


class InputFile(NamedTuple):
    """One file of a source."""

    path: str
    name: str
    """Relative to its source, with slashes: the same wherever the source lies."""
    source: int
    """Place of its source in the config."""
    size: int
    """Bytes."""
    mtime_ns: int
    """Another number of 64 bits when its content is another."""
    content: Content
    kind: Literal["files", "jsonl", "csv", "parquet"] = "files"
    """What is in it: text, or rows of this kind."""
    text_field: str = ""
    """Where the text of a row is."""
    delimiter: str = ""
    """Between the values of a csv file."""

    @property
    def is_cut(self) -> bool:
        """Whether a part of it can be read without what comes before."""
        return self.kind != "csv" and (self.kind == "parquet" or not is_archive(self.path))


class InputFiles(Sequence[InputFile]):
    """Files in order, each made when it is asked for: one takes the bytes of its path and about 35 more."""

    def __init__(self, files: Iterable[InputFile] = ()):
        self._text = bytearray()
        """The path of each; and its name after that, where the path does not end in it."""
        self._ends = array("Q", [0])
        """Where the text of each begins, which is where that before it ends."""
        self._path_lengths, self._name_lengths = array("I"), array("I")
        self._sizes, self._stamps = array("Q"), array("q")
        self._kinds = array("H")
        self._of_kind: list[InputFile] = []
        """What files have in common: a file of each kind."""
        self.extend(files)

    def extend(self, files: Iterable[InputFile]) -> None:
        known = {common: number for number, common in enumerate(self._of_kind)}
        for file in files:
            common = file._replace(path="", name="", size=0, mtime_ns=0)
            kind = known.setdefault(common, len(known))
            if kind == len(self._of_kind):
                self._of_kind.append(common)
            path, name = file.path.encode(*_STORED), file.name.encode(*_STORED)
            self._text += path if path.endswith(name) else path + name
            self._ends.append(len(self._text))
            self._path_lengths.append(len(path))
            self._name_lengths.append(len(name))
            self._sizes.append(file.size)
            self._stamps.append((file.mtime_ns + 2**63) % 2**64 - 2**63)
            self._kinds.append(kind)

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, number: int) -> InputFile: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[InputFile]: ...
    def __getitem__(self, number: int | slice) -> InputFile | Sequence[InputFile]:
        if isinstance(number, slice):
            return [self[place] for place in range(len(self))[number]]
        number = range(len(self))[number]
        text = self._text[self._ends[number] : self._ends[number + 1]]
        return self._of_kind[self._kinds[number]]._replace(
            path=text[: self._path_lengths[number]].decode(*_STORED),
            name=text[len(text) - self._name_lengths[number] :].decode(*_STORED),
            size=self._sizes[number],
            mtime_ns=self._stamps[number],
        )
