"""The tensors of a model's files, whatever their format."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from lmjax.convert import safetensors_files, torch_files
from lmjax.convert.gguf_files import GGUFFile, find_gguf
from lmjax.convert.mapped_files import TensorInfo, open_mapped
from lmjax.errors import InputError

__all__ = ["TensorFiles", "TensorInfo", "open_tensors"]


class TensorFiles(Protocol):
    """Tensors by name, under the names and in the layout of Hugging Face."""

    infos: Mapping[str, TensorInfo]
    """Every tensor, of whatever dtype: some files have masks too. Nothing of them has been read."""

    def read(self, name: str) -> np.ndarray:
        """The tensor, read-only: a view of mapped memory, or, of a quantised file, a copy of this one tensor."""
        ...

    def close(self) -> None:
        """Let go of the files; views that were read remain good."""
        ...


def open_tensors(path: Path) -> TensorFiles:
    """The tensors of a Hugging Face directory, or of a .gguf file.

    Of a directory, safetensors go before .bin files, and these before a .gguf file. The headers are read and compared
    with the files' sizes and the index; data is not. Raises InputError where there are no weights, a shard is missing,
    a file is cut off or malformed, or the index does not agree with the shards.
    """
    if path.is_dir():
        for single, reader in (
            (safetensors_files.SINGLE, safetensors_files.read_header),
            (torch_files.SINGLE, torch_files.read_state),
        ):
            found = open_mapped(path, single, reader)
            if found is not None:
                return found
    gguf = find_gguf(path)
    if gguf is not None:
        return GGUFFile(gguf)
    if not path.is_dir():
        what = "a file" if path.exists() else "not there"
        raise InputError(f"{path}: {what}; give a Hugging Face directory or a .gguf file")
    names = sorted(file.name for pattern in ("*.safetensors", "*.bin") for file in path.glob(pattern))
    raise InputError(
        f"{path}: no weights under the names that are read: {safetensors_files.SINGLE} or {torch_files.SINGLE}, each "
        "also in shards with a .index.json, or a .gguf file" + (f"; it has {', '.join(names[:5])}" if names else "")
    )
