"""A Hugging Face directory as parameters of ours: checked whole before a byte moves, read one slice at a time."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from lmjax.checkpoint.slices import chunk_shape
from lmjax.convert.casting import cast_into
from lmjax.convert.families import FAMILIES
from lmjax.convert.family import Family
from lmjax.convert.gguf_files import find_gguf, gguf_config
from lmjax.convert.layouts import Experts, Rows, Shape, Table
from lmjax.convert.mismatch import describe_mismatch
from lmjax.convert.pieces import Piece, is_ignored, is_of_further_layer, pieces
from lmjax.convert.settings import CONFIG_FILE, Settings, read_config_file
from lmjax.convert.tensors import TensorFiles, TensorInfo, open_tensors
from lmjax.errors import InputError
from lmjax.models.config import DecoderConfig

Index = tuple[slice | int, ...]

DTYPES = ("float32", "bfloat16", "float16")
"""What the tensors of the files may be: each value of these is a float32."""
COMPARED_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of ours, in the files of a model."""

    shape: Shape
    files: TensorFiles = dataclasses.field(repr=False)
    held: tuple[tuple[Piece, int], ...] = dataclasses.field(repr=False)
    """Where each slice along the stacked dimensions is, the last one fastest: a tensor, and the part of it. One for
    what is not stacked."""
    num_stacked: int = 0
    """Leading dimensions whose slices are in tensors of their own: 1 for blocks, 2 for blocks and experts."""
    dtype: np.dtype = dataclasses.field(default=np.dtype(np.float32))

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.stored.itemsize

    @property
    def stored(self) -> np.dtype:
        """That of the tensors it is read from, where these have the same one."""
        return self._stored

    @functools.cached_property
    def _stored(self) -> np.dtype:
        dtypes = {self.files.infos[piece.name].dtype for piece, _ in self.held}
        return dtypes.pop() if len(dtypes) == 1 else self.dtype

    @property
    def order(self) -> Literal["C", "F"]:
        """Of a slice in memory: kernels of linear layers lie in the files with their outputs first.

        Experts that share a chunk of a checkpoint would be interleaved there in the order of the files.
        """
        layout = self.held[0][0].layout
        has_experts = isinstance(layout, Experts) or self.num_stacked == 2
        if has_experts and chunk_shape(self.shape, self.stored.itemsize)[1] > 1:
            return "C"
        if isinstance(layout, Experts):
            return "F" if layout.output_first else "C"
        return "F" if isinstance(layout, Rows) and layout.num_inputs and not layout.input_first else "C"

    @property
    def _num_leading(self) -> int:
        """Dimensions before those of a matrix."""
        return self.num_stacked + isinstance(self.held[0][0].layout, Experts)

    def read(self, index: Index = ()) -> np.ndarray:
        """float32 values at ``index`` (as NumPy has it, steps of 1): a new array, and no more memory than its own."""
        return self._read(index, self.dtype)

    def read_stored(self, index: Index = ()) -> np.ndarray:
        """The same in the dtype ``stored``."""
        return self._read(index, self.stored)

    def _read(self, index: Index, dtype: np.dtype) -> np.ndarray:
        whole = [(choice, size) for choice, size in zip(_padded(index, len(self.shape)), self.shape, strict=True)]
        starts = [_range(choice, size) for choice, size in whole]
        out = _empty([stop - start for start, stop in starts], dtype, self.order, self._num_leading)
        stacked = list(zip(starts, self.shape, strict=True))[: self.num_stacked]
        for place in itertools.product(*(range(stop - start) for (start, stop), _ in stacked)):
            number = 0
            for ((start, _), size), offset in zip(stacked, place, strict=True):
                number = number * size + start + offset
            self._fill(out[place], number, starts[self.num_stacked :])
        dropped = tuple(0 if isinstance(choice, int | np.integer) else slice(None) for choice, _ in whole)
        return out[dropped]

    def _fill(self, out: np.ndarray, number: int, ranges: list[tuple[int, int]]) -> None:
        piece, part = self.held[number]
        tensor = self.files.read(piece.name)
        shapes = [held.shape for held in piece.parts]
        if isinstance(piece.layout, Table):  # without a copy of the table, which its padding would cost
            (start, stop), rest = ranges[0], ranges[1:]
            last = max(start, min(stop, piece.layout.num_rows))
            columns = tuple(slice(*found) for found in rest)
            cast_into(out[: last - start], tensor[piece.layout.before :][(slice(start, last), *columns)])
            out[last - start :] = 0
        else:
            view = piece.layout.read(tensor, shapes, part)
            cast_into(out, view[tuple(slice(*found) for found in ranges)])


@dataclasses.dataclass(frozen=True)
class Source:
    """A model of the Hugging Face kind whose every tensor has its place, name and shape in ours."""

    path: Path
    settings: dict[str, Any]
    """config.json as it is."""
    family: Family
    config: DecoderConfig
    leaves: Mapping[str, Leaf]
    """By path, such as ``segments/0/blocks/0/mlp/up/kernel``."""
    files: TensorFiles
    pieces: tuple[Piece, ...]
    """The tensors that are read, with the names that they have in the files."""
    left_out: int = 0
    """How many tensors are of layers that predict further tokens, which the decoder has not."""

    @property
    def huggingface(self) -> Path:
        """Where the tokenizer and the like are: the directory, or the GGUF file itself."""
        return self.path

    @property
    def dtype(self) -> str:
        """That of most of the bytes: ``bfloat16``, ``float16`` or ``float32``."""
        totals: dict[str, int] = {}
        for info in self._infos:
            totals[info.dtype.name] = totals.get(info.dtype.name, 0) + num_bytes(info)
        return max(totals, key=lambda name: totals[name])

    @property
    def num_bytes(self) -> int:
        """Of all tensors that are read."""
        return sum(map(num_bytes, self._infos))

    @property
    def largest_tensor(self) -> int:
        """Bytes of the largest tensor that is read."""
        return max(map(num_bytes, self._infos))

    @property
    def num_parameters(self) -> int:
        """A tied table counts once, padding rows not at all."""
        return sum(math.prod(info.shape) for info in self._infos)

    @property
    def _infos(self) -> list[TensorInfo]:
        return [self.files.infos[piece.name] for piece in self.pieces]

    def chunk(self, path: str) -> Shape:
        """The part of a parameter that is read in one go."""
        leaf = self.leaves[path]
        return (*(1,) * leaf.num_stacked, *leaf.shape[leaf.num_stacked :])

    def read(self, path: str, index: Index = ()) -> np.ndarray:
        """float32 values of one parameter; see ``Leaf.read``."""
        return self.leaves[path].read(index)

    def read_stored(self, path: str, index: Index = ()) -> np.ndarray:
        """The same in the dtype of the files."""
        return self.leaves[path].read_stored(index)

    def place(self, structs: Any) -> Any:
        """The parameters on devices, one after the other, each device's part read alone.

        ``structs`` is a tree of ``jax.ShapeDtypeStruct`` with shardings, as ``Blueprint.state.params``.
        """

        def put(path: Any, struct: jax.ShapeDtypeStruct) -> jax.Array:
            leaf = self.leaves[jax.tree_util.keystr(path, simple=True, separator="/")]
            assert leaf.shape == struct.shape, f"{path}: {struct.shape} wanted, {leaf.shape} in the files"
            assert struct.sharding is not None, f"{path} has no sharding"

            def read(index: Any) -> np.ndarray:
                return leaf.read(index).astype(struct.dtype, copy=False)

            return jax.make_array_from_callback(struct.shape, struct.sharding, read)

        return jax.tree_util.tree_map_with_path(put, structs)

    def extras(self) -> dict[str, np.ndarray]:
        """Values of the files that have no place in ours, by tensor: rows before the first one of a position table."""
        found = {}
        for piece in self.pieces:
            if isinstance(piece.layout, Table) and piece.layout.before:
                found[piece.name] = np.array(self.files.read(piece.name)[: piece.layout.before])
        return found


def open_source(path: str | Path) -> Source:
    """The model in ``path``: a directory with config.json and safetensors or .bin files, or a GGUF file.

    All names, shapes and dtypes are checked, and no tensor is read but a second copy of a tied table. Raises InputError
    for a family that is not known, an option that the decoder lacks, and files that do not hold the model: one list of
    what is missing, what is left over and what has another shape.
    """
    path = Path(path)
    gguf = None if (path / CONFIG_FILE).is_file() else find_gguf(path)
    settings = read_config_file(path) if gguf is None else gguf_config(gguf)
    place = str(path / CONFIG_FILE if gguf is None else gguf)
    family = find_family(settings, place)
    config = read_model(family, settings, place)
    files = open_tensors(path if gguf is None else gguf)
    wanted = pieces(family, config)
    names = _names_in_files(family, wanted, files)
    names = {name: inner for name, inner in names.items() if not is_of_further_layer(family, config, name)}
    tied = f"{family.head}.weight" if config.tie_embeddings else None
    _check(path, family, wanted, names, files, tied)
    renamed = [piece._replace(name=names[piece.name]) for piece in wanted]
    if tied is not None and tied in names:
        _check_tied(path, names[tied], next(piece for piece in renamed if piece.parts[0].path == "embed/table"), files)
    return Source(
        path=path,
        settings=settings,
        family=family,
        config=config,
        leaves=dict(_leaves(renamed, files)),
        files=files,
        pieces=tuple(renamed),
        left_out=len(files.infos) - len(names),
    )


def find_family(settings: Mapping[str, Any], place: str) -> Family:
    """By ``model_type``. Raises InputError, with those that are known, where it is not."""
    name = settings.get("model_type")
    if name not in FAMILIES:
        what = "no model_type" if name is None else f"model_type {name!r}"
        raise InputError(f"{place}: {what} that is known; these families are: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]


def read_model(family: Family, settings: Mapping[str, Any], place: str) -> DecoderConfig:
    """The decoder that a config.json describes. Raises InputError for what the decoder cannot do."""
    if quantization := settings.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise InputError(
            f"{place}: quantization_config: the weights are quantized ({method or quantization}), and those that are "
            f"converted are {' or '.join(DTYPES)}. Make a copy in bfloat16, without quantization_config, with what the "
            "model's publisher gives for it or with transformers' `dequantize`, and convert that."
        )
    reading = Settings(settings, place)
    fields = family.read_config(reading)
    reading.refuse_rest()
    try:
        return DecoderConfig(**fields)
    except InputError as error:
        raise InputError(f"{place}: not a model that the decoder can be: {error}") from None


def _names_in_files(family: Family, wanted: list[Piece], files: TensorFiles) -> dict[str, str]:
    """The names that the table knows to those in the files, which lack the first part if the class had no head."""
    prefix = family.embed.split(".")[0] + "."
    if any(name.startswith(prefix) for name in files.infos):
        return {name: name for name in files.infos}
    known = {piece.name for piece in wanted}
    return {name if name in known or name.startswith(family.head) else prefix + name: name for name in files.infos}


def _check(
    path: Path,
    family: Family,
    wanted: list[Piece],
    names: Mapping[str, str],
    files: TensorFiles,
    tied: str | None,
) -> None:
    expected = {piece.name: piece.shape for piece in wanted}
    table = next(piece for piece in wanted if piece.parts[0].path == "embed/table")
    if tied is not None and tied in names:
        expected[tied] = table.shape
    found = {name: files.infos[inner] for name, inner in names.items() if not is_ignored(family, name)}
    shapes = [
        (name, f"{_shown(found[name].shape)} in the file, {_shown(shape)} by {CONFIG_FILE}")
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    dtypes = [
        (name, f"{found[name].dtype}, which is not {' or '.join(DTYPES)}")
        for name in expected
        if name in found and found[name].dtype.name not in DTYPES
    ]
    gaps = [(name, _shown(shape)) for name, shape in expected.items() if name not in found]
    leftovers = [(name, _shown(info.shape)) for name, info in found.items() if name not in expected]
    message = describe_mismatch(
        {
            "missing": gaps,
            "that the model does not have": leftovers,
            "of another shape": shapes,
            "of a dtype that is not converted": dtypes,
        }
    )
    if message:
        raise InputError(
            f"{path}: the tensors of these files are not those of the {family.model_type} model in {CONFIG_FILE}:\n"
            f"{message}\nFetch the files anew, all from one place, or correct {CONFIG_FILE}."
        )


def _shown(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _check_tied(path: Path, head: str, embed: Piece, files: TensorFiles) -> None:
    """The tables bit by bit, but for -0."""
    ours, theirs = files.read(embed.name), files.read(head)
    step = max(1, COMPARED_BYTES // max(1, 4 * ours.shape[1]))
    for start in range(0, len(ours), step):
        rows = slice(start, start + step)
        if not np.array_equal(ours[rows], theirs[rows]):
            raise InputError(
                f"{path}: {head} differs from {embed.name}, and {CONFIG_FILE} says tie_word_embeddings, by which they "
                "are one table. Set it to false in config.json if both were trained."
            )


def _leaves(wanted: list[Piece], files: TensorFiles) -> Iterator[tuple[str, Leaf]]:
    held: dict[str, dict[tuple[int, ...], tuple[Piece, int]]] = {}
    for piece in wanted:
        for number, part in enumerate(piece.parts):
            held.setdefault(part.path, {})[part.index] = (piece, number)
    for path, places in held.items():
        last = max(places)
        piece, number = places[last]
        shape = (*(index + 1 for index in last), *piece.parts[number].shape)
        yield path, Leaf(shape, files, tuple(places[index] for index in sorted(places)), len(last))


def _empty(lengths: list[int], dtype: np.dtype, order: Literal["C", "F"], first: int) -> np.ndarray:
    """An array in which the slices along the ``first`` dimensions have this order."""
    if order == "C":
        return np.empty(lengths, dtype)
    reverse = (*range(first), *range(len(lengths) - 1, first - 1, -1))
    return np.empty([lengths[dim] for dim in reverse], dtype).transpose(reverse)


def _padded(index: Index, num_dims: int) -> Index:
    return (*index, *[slice(None)] * (num_dims - len(index)))


def _range(choice: slice | int, size: int) -> tuple[int, int]:
    if isinstance(choice, slice):
        start, stop, step = choice.indices(size)
        assert step == 1, "slices are contiguous"
        return start, max(start, stop)
    return choice % size, choice % size + 1


def num_bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * info.dtype.itemsize
