"""From a config to a dataset directory: ``lmjax data prepare``.

All is made under ``.unfinished`` in that directory, file by file, each whole or not there: a command that was killed
finds what it had made, and ends with the same bytes. What is finished moves out, ``index.json`` last.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydantic

from lmjax.data.config import DataConfig
from lmjax.data.files import write_bytes, writing
from lmjax.data.index import INDEX_FILE, Index, read_index, write_index
from lmjax.data.input_files import InputFile
from lmjax.data.merge import make_shard, select
from lmjax.data.parts import MAX_NAMED, Parts, PartSums, Recipe, Volume, make_part, read_sums, read_volumes
from lmjax.data.plans import ensure_plans
from lmjax.data.sample import sample_texts, train_model
from lmjax.data.shards import token_dtype
from lmjax.data.sources import check_columns, list_files
from lmjax.data.tokenizer import (
    HuggingFaceFile,
    SentencePieceFile,
    SentencePieceTrained,
    Tokenizer,
    TokenizerConfig,
    file_fingerprint,
    open_tokenizer,
    tokenizer_entry,
)
from lmjax.data.tokenizer_huggingface import ROLES_FILE
from lmjax.data.tokenizer_sentencepiece import SentencePieceTokenizer
from lmjax.data.workers import Workers
from lmjax.errors import InputError

UNFINISHED = ".unfinished"
NOT_OF_THE_DATASET = ("path", "num_workers", "sequence_length", "packing", "weights_by_step")
"""Fields of the config that the shards do not depend on."""
NOT_OF_A_SOURCE = ("weight", "epochs")
"""Fields of a source that the shards do not depend on."""


class Progress(NamedTuple):
    """How far a preparation is."""

    stage: str
    """``train tokenizer``, ``tokenize`` or ``write shards``."""
    done: int
    """Bytes of the sources, or shards."""
    total: int
    documents: int
    """Before duplicates are left out."""
    tokens: int


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig,
    progress: Callable[[Progress], None] | None = None,
    announce: Callable[[str], None] = _say,
) -> Index:
    """Make the dataset, go on making it, or announce that it is there; then its pack plans.

    Raises InputError where there is no text, where the directory holds something else or a dataset that was prepared
    with other options, and where it cannot be written.
    """
    directory = Path(data.path)
    report = progress or (lambda _: None)
    options = options_of(data, tokenizer)
    lengths = None
    if (directory / INDEX_FILE).is_file():
        index = _find_prepared(directory, options, data, announce)
    else:
        files = list_files(data.sources)
        with _unfinished(directory) as work, Workers(data.num_workers) as workers:
            if (directory / INDEX_FILE).is_file():  # another process was just ending
                index = _find_prepared(directory, options, data, announce)
            elif (work / INDEX_FILE).is_file():
                index = read_index(work)
                _compare(directory, index.options, options)
            else:
                index, lengths = _make(files, data, tokenizer, options, work, workers, report, announce)
            _publish(index, work, directory)
    shutil.rmtree(directory / UNFINISHED, ignore_errors=True)
    ensure_plans(data, index, announce, lengths)
    return index


def options_of(data: DataConfig, tokenizer: TokenizerConfig) -> dict[str, Any]:
    """What the shards depend on besides the sources' content, by the keys of the config."""
    section = pydantic.TypeAdapter(DataConfig).dump_python(data, mode="json")
    options = {f"data.{key}": value for key, value in section.items() if key not in NOT_OF_THE_DATASET}
    # Without a name a source is written as it was before there were names.
    left_out = (*NOT_OF_A_SOURCE, *(() if data.sources[0].name is not None else ("name",)))
    options["data.sources"] = [
        {key: value for key, value in source.items() if key not in left_out} for source in section["sources"]
    ]
    for key, value in pydantic.TypeAdapter(TokenizerConfig).dump_python(tokenizer, mode="json").items():
        options[f"tokenizer.{key}"] = value
    if isinstance(tokenizer, SentencePieceFile | HuggingFaceFile):
        options["tokenizer.path"] = f"SHA-256 {file_fingerprint(tokenizer)}"
    return options


def check_options(directory: str | Path, index: Index, data: DataConfig, tokenizer: TokenizerConfig) -> None:
    """Raises InputError that says what differs where a dataset was prepared with other options or another tokenizer."""
    _compare(Path(directory), index.options, options_of(data, tokenizer))


def _compare(directory: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    absent = object()
    lines = [
        f"  {key}: prepared with {json.dumps(found.get(key))}, the config has {json.dumps(wanted.get(key))}"
        for key in dict.fromkeys([*found, *wanted])
        if found.get(key, absent) != wanted.get(key, absent)
    ]
    if lines:
        raise InputError(
            "\n".join([f"{directory}: the dataset there was prepared with other options:", *lines])
            + "\nSet these back, give data.path another directory, or delete this one to prepare it anew."
        )


def _find_prepared(
    directory: Path, options: dict[str, Any], data: DataConfig, announce: Callable[[str], None]
) -> Index:
    index = read_index(directory)
    _compare(directory, index.options, options)
    for file in [index.tokenizer.file, *(shard.file for shard in index.shards)]:
        if not (directory / file).is_file():
            raise InputError(f"{directory / file}: missing; delete the directory and prepare the dataset anew")
    announce(f"{directory}: already prepared ({_describe(index)})")
    with contextlib.suppress(InputError):  # the sources may lie on another machine: the dataset stands without them
        if _inputs(list_files(data.sources)) != index.inputs:
            announce(
                f"{directory}: the sources are not what they were when this was prepared; to take them in, delete the "
                "directory or give data.path another one"
            )
    return index


@contextlib.contextmanager
def _unfinished(directory: Path) -> Iterator[Path]:
    """The place where the dataset is made, for this process alone."""
    if directory.is_dir() and not (directory / UNFINISHED).is_dir():
        there = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
        if there:
            raise InputError(
                f"{directory}: neither empty nor a dataset (there is {there[0]}, and no {INDEX_FILE}); nothing was "
                "changed; give data.path another directory"
            )
    work = directory / UNFINISHED
    with writing(work):
        (work / "parts").mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{directory}: another process is preparing it; wait for that one to end") from None
        yield work


def _make(
    files: Sequence[InputFile],
    data: DataConfig,
    config: TokenizerConfig,
    options: dict[str, Any],
    work: Path,
    workers: Workers,
    report: Callable[[Progress], None],
    announce: Callable[[str], None],
) -> tuple[Index, dict[str, np.ndarray]]:
    """Everything but the move to its place; and the lengths of each shard's documents, by its file."""
    check_columns(files)
    tokenizer = _make_tokenizer(files, data, config, work, report)
    dtype = token_dtype(tokenizer.vocab_size)
    recipe = Recipe(
        normalize=data.normalize,
        ftfy=data.ftfy,
        validation_fraction=data.validation_fraction,
        tokenizer=str(work / tokenizer.file),
        fingerprint=tokenizer.fingerprint,
        dtype=dtype,
    )
    parts = Parts(files, recipe, work / "parts")
    sums, volumes = _make_parts(parts, [source.name for source in data.sources], workers, report)
    selection = select(
        volumes, directory=work, shard_bytes=data.shard_bytes, dtype=dtype, vocab_size=tokenizer.vocab_size
    )
    documents, tokens = sum(part.documents for part in sums), sum(part.tokens for part in sums)
    num_skipped = sum(part.num_skipped for part in sums)
    skipped = tuple(entry for part in sums for entry in part.skipped)[:MAX_NAMED]
    if not any(job.split == "train" for job in selection.jobs):
        raise InputError(
            f"data.sources: no text to train on in {len(files)} files: {sum(part.empty for part in sums)} documents "
            f"are empty, {num_skipped} could not be read, {documents} fell in the validation split. Give files with "
            "text, encoded as UTF-8."
        )
    made = {}
    report(Progress("write shards", 0, len(selection.jobs), documents, tokens))
    for number, shard in workers.run(make_shard, selection.jobs):
        made[number] = shard
        report(Progress("write shards", len(made), len(selection.jobs), documents, tokens))
    shards = [made[number] for number in range(len(made))]
    counts = sum((shard.token_counts for shard in shards if shard.entry.split == "train"), np.int64(0))
    index = Index(
        tokenizer=tokenizer_entry(tokenizer),
        token_dtype=dtype,
        shards=tuple(shard.entry for shard in shards),
        token_counts=tuple(np.asarray(counts).tolist()),
        options=options,
        inputs=_inputs(files),
        duplicate_documents=selection.duplicates,
        empty_documents=sum(part.empty for part in sums),
        num_skipped=num_skipped,
        skipped=skipped,
    )
    write_index(work, index)
    announce(f"{data.path}: prepared {_describe(index)}")
    for entry in skipped:
        announce(f"skipped {entry.name}: {entry.reason}")
    if num_skipped > len(skipped):
        announce(f"skipped {num_skipped - len(skipped)} more")
    if data.validation_fraction and not any(shard.split == "validation" for shard in index.shards):
        announce(
            f"no document fell in the validation split: with {documents} documents, raise data.validation_fraction "
            f"from {data.validation_fraction} to evaluate while training"
        )
    return index, {job.file: lengths for job, lengths in zip(selection.jobs, selection.lengths, strict=True)}


def _make_tokenizer(
    files: Sequence[InputFile],
    data: DataConfig,
    config: TokenizerConfig,
    work: Path,
    report: Callable[[Progress], None],
) -> Tokenizer:
    """The tokenizer, with its file in ``work``."""
    if isinstance(config, SentencePieceTrained):
        known = [repr(config), data.normalize, data.ftfy, data.validation_fraction]
        key = _digest(itertools.chain(known, (file[1:] for file in files)))
        trained = work / f"trained-{key}.model"
        if not trained.is_file():
            report(Progress("train tokenizer", 0, 1, 0, 0))
            write_bytes(trained, train_model(config, sample_texts(files, data, config.sample_bytes)))
            report(Progress("train tokenizer", 1, 1, 0, 0))
        tokenizer: Tokenizer = SentencePieceTokenizer(trained.read_bytes(), str(trained))
    else:
        tokenizer = open_tokenizer(config)
    tokenizer.save(work)
    return tokenizer


def _make_parts(
    work: Parts, sources: Sequence[str | None], workers: Workers, report: Callable[[Progress], None]
) -> tuple[list[PartSums], list[Volume]]:
    """Make the parts that are not there yet; the sums and the volumes of all, in order. ``sources``: their names."""
    parts = work.parts
    sums: dict[int, PartSums] = {}
    volumes: dict[int, list[Volume]] = {}
    total = sum(part.num_bytes for part in parts)
    done = documents = tokens = 0

    def finish(number: int, found: PartSums) -> None:
        nonlocal done, documents, tokens
        part = parts[number]
        sums[number] = found
        volumes[number] = read_volumes(part, found.volumes, sources[part.source])  # here, while workers make others
        done, documents, tokens = done + part.num_bytes, documents + found.documents, tokens + found.tokens

    for number, part in enumerate(parts):
        if Path(part.path).is_file():
            finish(number, read_sums(part.path))
    missing = [number for number in range(len(parts)) if number not in sums]
    report(Progress("tokenize", done, total, documents, tokens))
    for place, found in workers.run(make_part, (work.job(parts[number]) for number in missing)):
        finish(missing[place], found)
        report(Progress("tokenize", done, total, documents, tokens))
    numbers = range(len(parts))
    return [sums[number] for number in numbers], [volume for number in numbers for volume in volumes[number]]


def _publish(index: Index, work: Path, directory: Path) -> None:
    """Move a whole dataset to its place, the index last; what an earlier attempt moved is there already."""
    with writing(directory):
        for file in [ROLES_FILE, index.tokenizer.file, *(shard.file for shard in index.shards), INDEX_FILE]:
            if (work / file).is_file():
                (work / file).replace(directory / file)


def _inputs(files: Sequence[InputFile]) -> dict[str, Any]:
    return {
        "files": len(files),
        "bytes": sum(file.size for file in files),
        "digest": _digest((file.source, file.name, file.size) for file in files),
    }


def _digest(items: Iterable[Any]) -> str:
    """SHA-256 of the JSON list of all items, which is not in memory as a whole."""
    digest = hashlib.sha256(b"[")
    for number, item in enumerate(items):
        digest.update((", " if number else "").encode() + json.dumps(item).encode())
    digest.update(b"]")
    return digest.hexdigest()


def _describe(index: Index) -> str:
    parts = []
    for split in dict.fromkeys(shard.split for shard in index.shards):
        shards = [shard for shard in index.shards if shard.split == split]
        documents, tokens = sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards)
        parts.append(f"{split}: {documents:,} documents, {tokens:,} tokens")
    return "; ".join(parts)
