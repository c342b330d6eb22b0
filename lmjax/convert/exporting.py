"""Parameters of ours as a Hugging Face directory, in bounded memory."""

import concurrent.futures
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import ml_dtypes
import numpy as np

from lmjax.checkpoint.layout import CHUNK_BYTES
from lmjax.checkpoint.slices import READ_COPIES, Index
from lmjax.convert.budget import BASE_BYTES, DEFAULT_BUDGET, Need, at_once
from lmjax.convert.card import Training, model_card
from lmjax.convert.casting import cast_into
from lmjax.convert.families import FAMILIES
from lmjax.convert.family import IN_FLOAT32
from lmjax.convert.importing import EXTRA_FILE, copy_files, read_extras
from lmjax.convert.layouts import Experts, Table
from lmjax.convert.output import new_directory
from lmjax.convert.pieces import Piece, Slice, pieces
from lmjax.convert.resemblance import choose_family, is_unchanged
from lmjax.convert.safetensors_files import SafetensorsWriter
from lmjax.convert.settings import CONFIG_FILE, WITHOUT_EFFECT, read_config_file, write_json
from lmjax.convert.tokenizer import GENERATION_FILE
from lmjax.models.config import DecoderConfig

Dtype = Literal["float32", "bfloat16"]
DTYPES: dict[str, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
DEFAULT_SHARD_BYTES = 5_000_000_000
CARD = "README.md"
NOT_COPIED = (CONFIG_FILE, EXTRA_FILE, CARD)


class Parameters(Protocol):
    """Our parameters, read in slices: a step that ``lmjax.checkpoint.slices.open_step`` opened, or a ``Source``."""

    def chunk(self, path: str) -> tuple[int, ...]:
        """The part of a parameter that is read in one go."""
        ...

    def read_stored(self, path: str, index: Index = ()) -> np.ndarray:
        """Values of the parameter at a path such as ``segments/0/blocks/0/mlp/up/kernel``: float32, or of fewer bits
        that are as good."""
        ...


class RunsOfExperts:
    """Parameters of which experts that share a chunk are read together, CHUNK_BYTES at most, and kept for the next."""

    def __init__(self, parameters: Parameters, wanted: Sequence[Piece]):
        self.chunk = parameters.chunk
        self._read = parameters.read_stored
        self._place: tuple[str, int, int] | None = None
        self._values = np.empty(0)
        self._lengths = {
            part.path: max(1, min(parameters.chunk(part.path)[1], CHUNK_BYTES // (4 * math.prod(part.shape))))
            for piece in wanted
            for part in piece.parts
            if len(part.index) == 2
        }

    def read_stored(self, path: str, index: Index = ()) -> np.ndarray:
        length = self._lengths.get(path, 1)
        if length == 1:
            return self._read(path, index)
        block, expert, *rest = index
        assert isinstance(block, int), "experts are read one by one"
        assert isinstance(expert, int)
        first = expert // length * length
        if (path, block, first) != self._place:
            self._place, self._values = None, np.empty(0)  # not beside the next ones
            self._values = self._read(path, (block, slice(first, first + length)))
            self._place = (path, block, first)
        return self._values[(expert - first, *rest)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    directory: Path
    model_type: str
    architecture: str
    dtype: Dtype
    num_parameters: int
    num_bytes: int
    """Of the weights."""
    num_shards: int


def export_model(
    parameters: Parameters,
    config: DecoderConfig,
    out: str | Path,
    *,
    huggingface: Path | None = None,
    files: Mapping[str, Path | bytes] | None = None,
    special_tokens: Mapping[str, int] | None = None,
    dtype: Dtype | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    memory_budget: int = DEFAULT_BUDGET,
    source: str | None = None,
    training: Training | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write a directory that ``AutoModelForCausalLM.from_pretrained`` loads; it is there whole, or not at all.

    ``huggingface`` is the directory of that name which the import of the model wrote, or the original one: its family
    is taken if it has such a model, its config.json as it is where the model is still the same, and its tokenizer and
    generation_config.json come along. ``files`` are others by name, such as the tokenizer of a run, and win over those.
    ``special_tokens`` (``bos_token_id``, ``eos_token_id``) go into config.json and generation_config.json where these
    do not come from ``huggingface``. ``dtype`` is by default that of the source, or else float32; a source in float16
    becomes float32, which has all its values. The model card says what ``training`` knows, or else that this is
    ``source`` converted.

    At most ``memory_budget`` bytes of anonymous memory are used, and those of the largest tensor of the files.
    ``progress`` is called with the bytes that were written and those that will be. Raises InputError for a model that
    no family has, with the fields in which the closest one differs, for an ``out`` that is not empty or cannot be
    written to, for a full disk, and for a budget that is too small, with the arithmetic.
    """
    settings = None if huggingface is None else read_config_file(huggingface)
    family = choose_family(config, FAMILIES.get((settings or {}).get("model_type", "")))
    dtype = dtype or _source_dtype(settings)
    wanted = pieces(family, config)
    largest_chunk = max(4 * math.prod(parameters.chunk(part.path)) for piece in wanted for part in piece.parts)
    block = Need("a part of the checkpoint", max(CHUNK_BYTES, largest_chunk), READ_COPIES)
    largest = max(math.prod(piece.shape) for piece in wanted) * DTYPES[dtype].itemsize
    # One tensor is being written while the next one is put together, where there is room for two.
    kept = 0 if config.moe is None else CHUNK_BYTES
    at_once(memory_budget, block, kept)
    ahead = 1 if memory_budget >= BASE_BYTES + kept + largest + block.total else 0
    parameters = RunsOfExperts(parameters, wanted)
    keys = _config_keys(family.model_type, family.architecture, family.write_config(config), settings, special_tokens)
    if settings is not None and is_unchanged(family, settings, config):
        keys = dict(settings)
        if family.further_layers in keys:
            keys[family.further_layers] = 0
    keys["dtype" if "dtype" in keys else "torch_dtype"] = dtype
    extras = {} if huggingface is None else read_extras(huggingface)
    with new_directory(out) as directory:
        writer = SafetensorsWriter(
            directory,
            [(piece.name, piece.shape) for piece in wanted],
            dtype=dtype,
            shard_bytes=shard_bytes,
            in_float32={piece.name for piece in wanted if _is_exact(piece)},
        )
        done = 0
        try:
            for piece, tensor in _assembled(parameters, wanted, DTYPES[dtype], extras, block.num_bytes, ahead):
                writer.write(piece.name, tensor)
                done += tensor.nbytes
                if progress is not None:
                    progress(done, writer.total_bytes)
            writer.finish()
        finally:
            writer.close()
        num_parameters = sum(math.prod(piece.shape) for piece in wanted)
        write_json(directory / CONFIG_FILE, keys)
        card = model_card(
            Path(out).name,
            architecture=family.architecture,
            num_parameters=num_parameters,
            dtype=dtype,
            source=source,
            training=training,
        )
        (directory / CARD).write_text(card)
        _write_files(directory, huggingface, files or {}, special_tokens)
        num_shards = len(list(directory.glob("*.safetensors")))
    return Exported(
        directory=Path(out),
        model_type=family.model_type,
        architecture=family.architecture,
        dtype=dtype,
        num_parameters=num_parameters,
        num_bytes=writer.total_bytes,
        num_shards=num_shards,
    )


def _source_dtype(settings: Mapping[str, Any] | None) -> Dtype:
    named = (settings or {}).get("dtype") or (settings or {}).get("torch_dtype")
    return "bfloat16" if named == "bfloat16" else "float32"


def _config_keys(
    model_type: str,
    architecture: str,
    written: Mapping[str, Any],
    settings: Mapping[str, Any] | None,
    special_tokens: Mapping[str, int] | None,
) -> dict[str, Any]:
    """config.json of a model that has none: what describes it, and of the source's what does not."""
    kept = {key: value for key, value in (settings or {}).items() if key in WITHOUT_EFFECT}
    return {**kept, **(special_tokens or {}), "architectures": [architecture], "model_type": model_type, **written}


def _assembled(
    parameters: Parameters,
    wanted: Sequence[Piece],
    dtype: np.dtype,
    extras: Mapping[str, np.ndarray],
    block_bytes: int,
    ahead: int,
) -> Iterator[tuple[Piece, np.ndarray]]:
    """The tensors one after the other; so many are put together ahead of the one that the caller has."""

    def assemble(piece: Piece) -> np.ndarray:
        own = DTYPES["float32"] if _is_exact(piece) else dtype
        return assemble_tensor(parameters, piece, own, extras.get(piece.name), block_bytes)

    if not ahead:
        yield from ((piece, assemble(piece)) for piece in wanted)
        return
    with concurrent.futures.ThreadPoolExecutor(1, "assemble") as thread:
        following = thread.submit(assemble, wanted[0])
        for piece, after in zip(wanted, [*wanted[1:], None], strict=True):
            tensor = following.result()
            if after is not None:
                following = thread.submit(assemble, after)
            yield piece, tensor


def _is_exact(piece: Piece) -> bool:
    """Whether a tensor is float32 in files of every dtype."""
    return piece.parts[0].path.rpartition("/")[2] in IN_FLOAT32


def assemble_tensor(
    parameters: Parameters, piece: Piece, dtype: np.dtype, extra: np.ndarray | None, block_bytes: int
) -> np.ndarray:
    """A tensor of the files, in ``dtype``; ``extra`` are the first rows of a table, which are 0 without."""
    tensor = np.empty(piece.shape, dtype)
    if isinstance(piece.layout, Table):
        before = piece.layout.before
        tensor[:before] = 0 if extra is None else extra
        _fill(tensor[before:], parameters, piece.parts[0], block_bytes)
        return tensor
    shapes = [part.shape for part in piece.parts]
    views = [piece.layout.read(tensor, shapes, number) for number in range(len(shapes))]
    if isinstance(piece.layout, Experts):
        (part,) = piece.parts
        for expert, view in enumerate(views[0]):
            _fill(view, parameters, Slice(part.path, (*part.index, expert), part.shape[1:]), block_bytes)
        return tensor
    if len(views) == 1 and 4 * views[0].size <= block_bytes:
        values = parameters.read_stored(piece.parts[0].path, piece.parts[0].index)
        if values.dtype == dtype and values.strides == views[0].strides:  # it lies in memory as it does in the file
            return values.ravel(order="K").reshape(piece.shape)
        cast_into(views[0], values)
        return tensor
    if all(np.may_share_memory(view, tensor) for view in views):
        for view, part in zip(views, piece.parts, strict=True):
            _fill(view, parameters, part, block_bytes)
        return tensor
    del tensor, views  # the layout mixes the parts in a way that no view has
    parts = [np.empty(part.shape, dtype) for part in piece.parts]
    for array, part in zip(parts, piece.parts, strict=True):
        _fill(array, parameters, part, block_bytes)
    return piece.layout.write(parts)


def _fill(out: np.ndarray, parameters: Parameters, part: Slice, block_bytes: int) -> None:
    """Set ``out`` to the slice, or to its first rows, a few rows at a time."""
    row = 4 * math.prod(out.shape[1:])
    chunk = parameters.chunk(part.path)[len(part.index) :]
    step = max(1, block_bytes // max(1, row))
    step = max(step // chunk[0] * chunk[0], 1) if step >= chunk[0] else step
    for start in range(0, len(out), step):
        rows = slice(start, min(start + step, len(out)))
        cast_into(out[rows], parameters.read_stored(part.path, (*part.index, rows)))


def _write_files(
    directory: Path,
    huggingface: Path | None,
    files: Mapping[str, Path | bytes],
    special_tokens: Mapping[str, int] | None,
) -> None:
    """What is neither weights nor config.json nor the card."""
    if huggingface is not None:
        copy_files(huggingface, directory, without=NOT_COPIED)
    for name, content in files.items():
        if isinstance(content, bytes):
            (directory / name).write_bytes(content)
        else:
            shutil.copyfile(content, directory / name)
    if not (directory / GENERATION_FILE).exists():
        write_json(directory / GENERATION_FILE, special_tokens or {})
