"""A Hugging Face directory as a checkpoint of ours, in bounded memory."""

import dataclasses
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import yaml

import lmjax
from lmjax.checkpoint.slices import WRITE_COPIES, slice_bytes, write_step
from lmjax.convert.budget import DEFAULT_BUDGET, Need, at_once
from lmjax.convert.gguf_files import GGUFFile, find_gguf
from lmjax.convert.gguf_tokenizer import TOKENIZER_FILE, gguf_tokenizer
from lmjax.convert.mapped_files import MappedFiles
from lmjax.convert.output import new_directory
from lmjax.convert.safetensors_files import SINGLE, SafetensorsWriter, read_header
from lmjax.convert.settings import CONFIG_FILE, write_json
from lmjax.convert.source import Source, open_source
from lmjax.models.config import DecoderConfig

MODEL_FILE = "model.yaml"
HUGGING_FACE = "huggingface"
"""Where the files that are no weights go, as they came."""
CHECKPOINTS = "checkpoints"
EXTRA_FILE = "extra.safetensors"
COPIED = (
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported:
    """What was written."""

    directory: Path
    model_type: str
    config: DecoderConfig
    num_parameters: int
    source_dtype: str
    source_bytes: int
    left_out: int
    """Tensors of layers that predict further tokens."""


def import_model(
    source: str | Path | Source,
    out: str | Path,
    *,
    memory_budget: int = DEFAULT_BUDGET,
    progress: Callable[[int, int], None] | None = None,
) -> Imported:
    """Write the model in ``source`` (what ``open_source`` takes, or returned) as a directory of ours.

    ``out`` gets ``model.yaml`` (a config's ``model`` section, for ``base:``), ``huggingface/`` (config.json, tokenizer
    and the like, as they came, and ``extra.safetensors`` where the files have values that our parameters have not),
    and ``checkpoints/0/`` with the parameters: float32, stored in the dtype of the files. It is there whole when this
    returns, or not at all.

    At most ``memory_budget`` bytes of anonymous memory are used, and those of the largest tensor of the files.
    ``progress`` is called with the bytes that were written and those that will be, from another thread.
    Raises InputError for what ``open_source`` refuses, for an ``out`` that is not empty or cannot be written to, for a
    full disk, and for a budget that is too small, with the arithmetic.
    """
    source = source if isinstance(source, Source) else open_source(source)
    largest = max(slice_bytes(leaf.shape, leaf.stored.itemsize) for leaf in source.leaves.values())
    dequantised = source.largest_tensor if isinstance(source.files, GGUFFile) else 0  # others are read in place
    num_at_once = at_once(memory_budget + dequantised, Need("a slice", largest, WRITE_COPIES), dequantised)
    with new_directory(out) as directory:
        (directory / MODEL_FILE).write_text(model_yaml(source.config, source.path.name))
        _keep(source, directory / HUGGING_FACE)
        written, total = 0, sum(leaf.num_bytes for leaf in source.leaves.values())

        def count(num_bytes: int) -> None:
            nonlocal written
            written += num_bytes
            if progress is not None:
                progress(written, total)

        metadata = {
            "source": source.path.name,
            "model_type": source.family.model_type,
            "dtype": source.dtype,
            "lmjax": lmjax.__version__,
            "config": {"model": _tree(source.config)},
        }
        write_step(
            directory / CHECKPOINTS,
            0,
            "params",
            source.leaves,
            metadata,
            dtype="float32",
            num_at_once=num_at_once,
            written=count,
        )
    return Imported(
        directory=Path(out),
        model_type=source.family.model_type,
        config=source.config,
        num_parameters=source.num_parameters,
        source_dtype=source.dtype,
        source_bytes=source.num_bytes,
        left_out=source.left_out,
    )


def model_yaml(config: DecoderConfig, source: str) -> str:
    """The ``model`` section of a config: what differs from the defaults."""
    changed = _changed(config, _tree(config))
    for name in ("latent", "moe"):
        if (section := getattr(config, name)) is not None:
            changed[name] = _changed(section, changed[name])
    text = yaml.safe_dump({"model": changed}, sort_keys=False, width=120)
    return f"# {source}, by `lmjax convert import`; `base:` of a config takes this file.\n{text}"


def _changed(config: Any, tree: dict[str, Any]) -> dict[str, Any]:
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {name: value for name, value in tree.items() if getattr(config, name) != defaults[name]}


def _keep(source: Source, target: Path) -> None:
    """Write what came with the weights."""
    target.mkdir()
    gguf = find_gguf(source.path) if isinstance(source.files, GGUFFile) else None
    if gguf is None:
        copy_files(source.path, target)
    elif (gguf.parent / TOKENIZER_FILE).exists():
        copy_files(gguf.parent, target, without=() if source.path.is_dir() else (CONFIG_FILE,))
    else:
        for name, content in gguf_tokenizer(gguf).items():
            write_json(target / name, content)
    if not (target / CONFIG_FILE).exists():
        write_json(target / CONFIG_FILE, source.settings)
    write_extras(source.extras(), target)


def _tree(config: DecoderConfig) -> dict[str, Any]:
    return pydantic.TypeAdapter(DecoderConfig).dump_python(config, mode="json")


def copy_files(folder: Path, target: Path, without: Collection[str] = ()) -> None:
    """Copy what comes along with weights: tokenizer, config, licence."""
    for path in sorted({path for pattern in COPIED for path in folder.glob(pattern)}):
        if path.name in without:
            continue
        if path.is_file():
            shutil.copyfile(path, target / path.name)
        else:
            shutil.copytree(path, target / path.name)


def write_extras(extras: Mapping[str, np.ndarray], target: Path) -> None:
    """Keep the values that our parameters have no place for."""
    if not extras:
        return
    shapes = [(name, array.shape) for name, array in extras.items()]
    writer = SafetensorsWriter(target, shapes, dtype="float32", shard_bytes=1 << 62)
    for name, array in extras.items():
        writer.write(name, array)
    writer.finish()
    (target / SINGLE).rename(target / EXTRA_FILE)


def read_extras(folder: Path) -> dict[str, np.ndarray]:
    """What ``write_extras`` kept."""
    if not (folder / EXTRA_FILE).is_file():
        return {}
    files = MappedFiles([folder / EXTRA_FILE], read_header)
    return {name: files.read(name) for name in files.infos}
