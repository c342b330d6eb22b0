"""From a config to a dataset on disk: ``lmjax data prepare``.

The work is done in parts that are each written whole, under ``.preparing`` in the dataset's directory. A preparation that
was killed goes on with the parts that are there, and ends with the same bytes.
"""

import concurrent.futures
import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic

from lmjax.data.config import DataConfig
from lmjax.data.files import write_whole
from lmjax.data.index import NAME, Index, read_index, write_index
from lmjax.data.merge import SPLITS, merge
from lmjax.data.parts import PartJob, make_part
from lmjax.data.plans import ensure_plan
from lmjax.data.sample import train_tokenizer
from lmjax.data.shards import token_dtype
from lmjax.data.sources import find_parts, listing
from lmjax.data.tokenizer import (
    SentencePieceTraining,
    Tokenizer,
    TokenizerConfig,
    describe_tokenizer,
    open_tokenizer,
    read_sentencepiece,
)
from lmjax.errors import InputError

WORK = ".preparing"
NOT_OPTIONS = ("path", "num_workers", "sequence_length", "packing")
"""What the documents and shards do not depend on; each length and packing has a plan of its own."""

Progress = Callable[[int, int], None]
"""Told after each part: how many are made, of how many."""


def prepare(
    data: DataConfig, tokenizer: TokenizerConfig, *, progress: Progress | None = None, announce: Callable[[str], None] = print
) -> Index:
    """Make the dataset, go on with one that was being made, or say that it is there.

    Raises InputError for a directory that holds another dataset or something else, an empty corpus, and a disk that
    cannot take it; what was there before stays as it is.
    """
    directory = Path(data.path)
    options = prepared_options(data, tokenizer)
    files = listing(data)
    if (directory / NAME).exists():
        index = read_index(data.path)
        check_options(data.path, index, options | {"corpus": _digest(files)})
        announce(f"{directory}: already prepared")
    else:
        work = _open_work(directory, {"options": options, "files": files})
        index = _make(data, tokenizer, directory, work, options | {"corpus": _digest(files)}, progress)
        shutil.rmtree(work)
    for split in sorted({shard.split for shard in index.shards}):
        ensure_plan(
            data.path,
            index,
            split=split,
            sequence_length=data.sequence_length,
            packing=data.packing,
            announce=announce,
        )
    return index


def prepared_options(data: DataConfig, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """Everything that the documents and their tokens depend on, but the text itself."""
    tree = pydantic.TypeAdapter(DataConfig).dump_python(data, mode="json")
    kept = {f"data.{key}": value for key, value in tree.items() if key not in NOT_OPTIONS}
    return kept | {"tokenizer": pydantic.TypeAdapter(TokenizerConfig).dump_python(tokenizer, mode="json")}


def check_options(directory: str, index: Index, options: dict[str, Any]) -> None:
    """Raises InputError where a dataset was prepared with other options than these."""
    differing = [key for key, value in options.items() if index.options.get(key) != value]
    if not differing:
        return
    lines = [f"  {key}: it was made with {index.options.get(key)!r}, the config has {options[key]!r}" for key in differing]
    raise InputError(
        f"{directory}: a dataset is there that was prepared otherwise:\n" + "\n".join(lines) + "\n"
        "Give these their former values, choose another data.path, or remove the directory to prepare it again."
    )


def _open_work(directory: Path, identity: dict[str, Any]) -> Path:
    """The directory of the parts, emptied if those in it are of other options or another corpus."""
    if directory.is_dir() and any(path.name != WORK and not _is_ours(path) for path in directory.iterdir()):
        raise InputError(
            f"{directory}: the directory is not empty and has no {NAME}, so it is not a dataset. "
            "Choose another data.path, or empty this one."
        )
    work = directory / WORK
    text = json.dumps(identity).encode()
    recorded = work / "identity.json"
    if not recorded.exists() or recorded.read_bytes() != text:
        if work.exists():
            shutil.rmtree(work)
        work.mkdir(parents=True)
        write_whole(recorded, text)
    return work


def _is_ours(path: Path) -> bool:
    """Whether a preparation that was killed while it merged left this."""
    return path.name.startswith(tuple(f"{dot}{split}-" for dot in ("", ".") for split in SPLITS)) or (
        path.name.endswith(".partial") or path.name == "tokenizer.model"
    )


def _make(
    data: DataConfig,
    config: TokenizerConfig,
    directory: Path,
    work: Path,
    options: dict[str, Any],
    progress: Progress | None,
) -> Index:
    tokenizer = _tokenizer(data, config, work)
    file = str(work / tokenizer.file) if tokenizer.file else None
    jobs = [
        PartJob(part, data, file, str(work / f"part-{number:06d}.npz")) for number, part in enumerate(find_parts(data))
    ]
    _make_parts([job for job in jobs if not Path(job.output).exists()], len(jobs), data.num_workers, progress)
    merged = merge([Path(job.output) for job in jobs], directory, data, tokenizer.vocab_size)
    if not any(shard.split == "train" for shard in merged.shards):
        raise InputError(
            f"{directory}: the sources have no text to train on ({merged.num_empty} empty documents, "
            f"{len(merged.skipped_files)} unreadable files, {sum(shard.documents for shard in merged.shards)} held out). "
            "Add text, or lower data.validation_fraction."
        )
    tokenizer.save(directory)
    index = Index(
        tokenizer=describe_tokenizer(tokenizer),
        token_dtype=token_dtype(tokenizer.vocab_size),
        shards=merged.shards,
        token_counts=merged.token_counts,
        options=options,
        documents_dropped={"duplicate": merged.num_duplicates, "empty": merged.num_empty},
        skipped_files=merged.skipped_files,
    )
    write_index(str(directory), index)
    return index


def _tokenizer(data: DataConfig, config: TokenizerConfig, work: Path) -> Tokenizer:
    """The tokenizer, its file in the work directory."""
    if not isinstance(config, SentencePieceTraining):
        tokenizer = open_tokenizer(config)
        tokenizer.save(work)
        return tokenizer
    trained = work / "tokenizer.model"
    if not trained.exists():
        train_tokenizer(data, config).save(work)
    return read_sentencepiece(trained)


def _make_parts(jobs: list[PartJob], total: int, num_workers: int, progress: Progress | None) -> None:
    done = total - len(jobs)

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    if num_workers == 1 or len(jobs) <= 1:
        for job in jobs:
            make_part(job)
            count()
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with concurrent.futures.ProcessPoolExecutor(min(num_workers, len(jobs)), mp_context=context) as pool:
        try:
            for future in concurrent.futures.as_completed([pool.submit(make_part, job) for job in jobs]):
                future.result()
                count()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _digest(files: list[tuple[str, int]]) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(files).encode()).hexdigest()
