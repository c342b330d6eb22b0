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
        self._kind_numbers: dict[InputFile, int] = {}
        self.extend(files)

    def extend(self, files: Iterable[InputFile]) -> None:
        for file in files:
            path, name = file.path.encode(*_STORED), file.name.encode(*_STORED)
            text = path if path.endswith(name) else path + name
            common = file._replace(path="", name="", size=0, mtime_ns=0)
            self._append(text, len(path), len(name), file.size, (file.mtime_ns + 2**63) % 2**64 - 2**63, common)

    def extend_sorted(self, files: "InputFiles") -> None:
        """The same, by their names, and by their paths where these are one."""

        def key(number: int) -> bytes:  # sorts as the pair would, in one object a file
            text, length = files._text_of(number), files._name_lengths[number]
            return text[len(text) - length :] + b"\0" + text[: files._path_lengths[number]]

        for number in sorted(range(len(files)), key=key):
            self._append(
                files._text_of(number),
                files._path_lengths[number],
                files._name_lengths[number],
                files._sizes[number],
                files._stamps[number],
                files._of_kind[files._kinds[number]],
            )

    def _append(
        self, text: bytes, path_length: int, name_length: int, size: int, stamp: int, common: InputFile
    ) -> None:
        if common not in self._kind_numbers:
            self._kind_numbers[common] = len(self._of_kind)
            self._of_kind.append(common)
        self._text += text
        self._ends.append(len(self._text))
        self._path_lengths.append(path_length)
        self._name_lengths.append(name_length)
        self._sizes.append(size)
        self._stamps.append(stamp)
        self._kinds.append(self._kind_numbers[common])

    def _text_of(self, number: int) -> bytes:
        return bytes(self._text[self._ends[number] : self._ends[number + 1]])

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
        text, common = self._text_of(number), self._of_kind[self._kinds[number]]
        return InputFile(
            text[: self._path_lengths[number]].decode(*_STORED),
            text[len(text) - self._name_lengths[number] :].decode(*_STORED),
            common.source,
            self._sizes[number],
            self._stamps[number],
            *common[5:],
        )
