"""How a tensor of a Hugging Face file holds parts of our tree: one layout, read in both directions.

A part is one slice of a parameter, without the dimension that layers are stacked along: a kernel (in ..., out ...), a
vector (...), or a table (rows, embed). What is read is a view of the file's tensor wherever NumPy can give one.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

Shape = tuple[int, ...]


class Layout(Protocol):
    """How one tensor holds some parts."""

    def shape(self, parts: Sequence[Shape]) -> Shape:
        """Of the tensor that holds parts of these shapes."""
        ...

    def read(self, tensor: np.ndarray, parts: Sequence[Shape], number: int) -> np.ndarray:
        """Part ``number`` of the tensor."""
        ...

    def write(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The tensor that holds these parts."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """A tensor (out, in) of a linear layer, or (out) of a bias or a norm, in which parts lie along ``out``.

    ``grouped`` fuses queries, keys and values head by head: for each key head its query heads, itself, and its value
    head. One query head a key head is the layout (heads, 3, head_dim) of GPT-NeoX and BLOOM, one key head that of
    Falcon 7B, and groups in between that of Falcon 40B. DeepSeek has keys and values so, of two widths.
    """

    num_inputs: int
    """Dimensions of our kernel that are summed over: 0 for a vector, 2 for attention's output projection, else 1."""
    order: Literal["stacked", "grouped"] = "stacked"
    """``stacked``: one part after the other."""
    input_first: bool = False
    """Whether the file has (in, out), as GPT-2's Conv1D."""

    def shape(self, parts: Sequence[Shape]) -> Shape:
        inputs = math.prod(parts[0][: self.num_inputs])
        rows = sum(math.prod(shape[self.num_inputs :]) for shape in parts)
        if not self.num_inputs:
            return (rows,)
        return (inputs, rows) if self.input_first else (rows, inputs)

    def read(self, tensor: np.ndarray, parts: Sequence[Shape], number: int) -> np.ndarray:
        rows = tensor.T if self.input_first else tensor
        groups = self._groups(parts)
        sizes = [math.prod(shape[self.num_inputs :]) // groups for shape in parts]
        start = sum(sizes[:number])
        of_group = rows.reshape(groups, -1, *rows.shape[1:])[:, start : start + sizes[number]]
        rows = of_group.reshape(-1, *rows.shape[1:])
        return (rows.T if self.num_inputs else rows).reshape(parts[number])

    def write(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        rows = [self._rows(part) for part in parts]
        groups = self._groups([part.shape for part in parts])
        if len(rows) == 1:
            fused = rows[0]
        else:
            of_groups = [part.reshape(groups, -1, *part.shape[1:]) for part in rows]
            fused = np.concatenate(of_groups, axis=1).reshape(-1, *rows[0].shape[1:])
        return fused.T if self.input_first else fused

    def _groups(self, parts: Sequence[Shape]) -> int:
        """How often the tensor has some rows of each part, one part after the other: once, or for each key head."""
        return parts[-1][self.num_inputs] if self.order == "grouped" and len(parts) > 1 else 1

    def _rows(self, part: np.ndarray) -> np.ndarray:
        if not self.num_inputs:
            return part.reshape(-1)
        return part.reshape(math.prod(part.shape[: self.num_inputs]), -1).T


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experts:
    """A tensor (experts x rows, embed) of the matrices of all experts of a block, one after the other, as DBRX has
    them. Our part is (experts, in, out)."""

    output_first: bool
    """Whether an expert's rows are its outputs, as of a linear layer, or its inputs."""

    def shape(self, parts: Sequence[Shape]) -> Shape:
        experts, inputs, outputs = parts[0]
        return (experts * outputs, inputs) if self.output_first else (experts * inputs, outputs)

    def read(self, tensor: np.ndarray, parts: Sequence[Shape], number: int) -> np.ndarray:
        matrices = tensor.reshape(parts[0][0], -1, tensor.shape[1])
        return matrices.swapaxes(1, 2) if self.output_first else matrices

    def write(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        matrices = parts[0].swapaxes(1, 2) if self.output_first else parts[0]
        return matrices.reshape(-1, matrices.shape[2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The rows of a table, or the entries of a vector over the vocabulary, without our padding."""

    num_rows: int
    before: int = 0
    """Rows in the file before that of our first one; they are never read."""

    def shape(self, parts: Sequence[Shape]) -> Shape:
        return (self.before + self.num_rows, *parts[0][1:])

    def read(self, tensor: np.ndarray, parts: Sequence[Shape], number: int) -> np.ndarray:
        rows = tensor[self.before :]
        padding = parts[0][0] - self.num_rows
        if not padding:
            return rows
        return np.concatenate([rows, np.zeros((padding, *rows.shape[1:]), rows.dtype)])

    def write(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        rows = parts[0][: self.num_rows]
        if not self.before:
            return rows
        return np.concatenate([np.zeros((self.before, *rows.shape[1:]), rows.dtype), rows])
