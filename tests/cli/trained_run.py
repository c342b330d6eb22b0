"""A run directory as training leaves it, made without training: random parameters, and a dataset of bytes."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmjax.checkpoint.save import CheckpointConfig, Saver
from lmjax.config import RunConfig, dump
from lmjax.data.config import DataConfig, FilesSource
from lmjax.data.index import Index, ShardEntry, TokenizerEntry, fingerprint, write_index
from lmjax.data.prepare import options_of
from lmjax.data.shards import shard_file, write_shard
from lmjax.data.tokenizer import BytesTokenizer, ByteTokenizer
from lmjax.precision import PrecisionConfig
from lmjax.train.config import EvaluateConfig, TrainConfig
from lmjax.train.state import Blueprint
from tests import tiny

CONFIG = tiny.with_changes(tiny.CONFIG, vocab_size=300, max_length=32, num_kv_heads=2, num_layers=1)
TEXTS = {"train": ["one text", "and one more"], "validation": ["a text that was held out", "and this one as well"]}
STEPS = (4, 6)


class TrainedRun(NamedTuple):
    """Where it is, and what is in it."""

    directory: Path
    dataset: Path
    blueprint: Blueprint
    """On one device."""
    params: dict[int, Any]
    """By the step of their checkpoint, on one device."""

    def documents(self, split: str) -> list[list[int]]:
        return [_document(text) for text in TEXTS[split]]


def make_run(root: Path, rng: np.random.Generator, texts: dict[str, list[str]] = TEXTS) -> TrainedRun:
    """A run under ``root`` with a checkpoint at each of STEPS."""
    run, dataset = root / "run", root / "dataset"
    data = DataConfig(path=str(dataset), sources=(FilesSource(path="texts"),), sequence_length=32)
    tokenizer = BytesTokenizer(kind="bytes")
    index = _make_dataset(dataset, texts, options_of(data, tokenizer))
    run.mkdir()
    config = RunConfig(
        run_dir=str(run),
        model=CONFIG,
        tokenizer=tokenizer,
        data=data,
        precision=PrecisionConfig(compute="float32"),
        train=TrainConfig(steps=STEPS[-1], global_batch_size=4, accumulation=2),
        evaluate=EvaluateConfig(max_rows=2),
    )
    dump(config, str(run / "config.yaml"))
    blueprint = tiny.blueprint_of(CONFIG, tiny.mesh_of(1, 1, 1))
    saver = Saver(str(run / "checkpoints"), CheckpointConfig(keep_last=len(STEPS)))
    params = {}
    for step in STEPS:
        state = tiny.state_of(blueprint, tiny.random_params(blueprint, rng))
        params[step] = state.params
        saver.save(step, state, {"dataset": fingerprint(index)})
    saver.close()
    return TrainedRun(run, dataset, blueprint, params)


def _document(text: str) -> list[int]:
    return [ByteTokenizer.bos_id, *text.encode(), ByteTokenizer.eos_id]


def _make_dataset(directory: Path, texts: dict[str, list[str]], options: dict[str, Any]) -> Index:
    directory.mkdir()
    tokenizer = ByteTokenizer()
    shards = []
    for split, documents in texts.items():
        file = shard_file(split, 0, 1)
        sums = write_shard(directory / file, [np.array(_document(text)) for text in documents], "uint16")
        shards.append(ShardEntry(file=file, split=split, **sums._asdict()))
    counts = Counter(token for text in texts["train"] for token in _document(text)[1:])
    entry = TokenizerEntry(
        kind=tokenizer.kind,
        file=tokenizer.save(directory),
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )
    index = Index(
        tokenizer=entry,
        token_dtype="uint16",
        shards=tuple(shards),
        token_counts=tuple(counts[token] for token in range(tokenizer.vocab_size)),
        options=options,
    )
    write_index(directory, index)
    return index
