"""A run's configs, checked against each other, and what they are built into before the first step."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from lmjax.checkpoint.processes import refused_by_all
from lmjax.checkpoint.save import CheckpointConfig
from lmjax.data.batches import Batches, EvaluationBatches
from lmjax.data.config import DataConfig
from lmjax.data.index import Index, read_index
from lmjax.data.plans import Plan, ensure_plan
from lmjax.data.prepare import check_options
from lmjax.data.shards import verify_shards
from lmjax.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer
from lmjax.errors import InputError
from lmjax.mesh import MeshConfig, batch_shards, make_mesh
from lmjax.models.decoder import DecoderConfig, Execution
from lmjax.ops.attention import Choice, choose_kernel
from lmjax.ops.attention_mask import Mask
from lmjax.ops.cross_entropy import LossOptions
from lmjax.optim import OptimizerConfig
from lmjax.precision import PrecisionConfig
from lmjax.train.config import EvaluateConfig, LoggingConfig, TrainConfig
from lmjax.train.state import Blueprint, make_blueprint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The sections of a run's config."""

    run_dir: str
    model: DecoderConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    mesh: MeshConfig
    precision: PrecisionConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    evaluate: EvaluateConfig
    logging: LoggingConfig
    resolved: dict[str, Any]
    """All of it as plain data, for the checkpoints' manifests."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What is computed, and on which devices; no data yet."""

    mesh: Mesh
    blueprint: Blueprint
    execution: Execution
    loss: LossOptions
    kernels: dict[str, Choice]
    """The attention kernel of each kind of block, and why it is this one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """A prepared dataset whose bytes were verified."""

    directory: str
    index: Index
    tokenizer: Tokenizer
    batches: Batches
    evaluation: EvaluationBatches | None
    """None where no document was held out."""


def make_program(job: Job, mesh: Mesh | None = None) -> Program:
    """``mesh`` may be of absent devices. Raises InputError for configs that do not fit each other or the mesh."""
    mesh = make_mesh(job.mesh) if mesh is None else mesh
    platform = mesh.devices.flat[0].platform
    check_shapes(job, mesh)
    return Program(
        mesh=mesh,
        kernels=choose_kernels(job, platform),
        blueprint=make_blueprint(job.model, job.optimizer, job.train.steps, mesh),
        execution=Execution(
            compute_dtype=job.precision.compute_dtype,
            reduce_in_float32=job.precision.reduce_in_float32,
            attention_kernel=job.train.attention_kernel,
            platform=platform,
            remat=job.train.remat,
            scan_layers=job.train.scan_layers,
        ),
        loss=LossOptions(z_loss=job.train.z_loss, chunk_tokens=job.train.loss_chunk_tokens),
    )


def choose_kernels(job: Job, platform: str) -> dict[str, Choice]:
    """Raises InputError where the attention kernel that is asked for cannot do what a block needs."""
    return {
        kind: choose_kernel(
            job.train.attention_kernel,
            mask=Mask(causal=True, window=job.model.window(kind)),
            segmented=True,
            platform=platform,
            length=job.data.sequence_length,
        )
        for kind in dict.fromkeys(job.model.layer_pattern)
    }


def check_shapes(job: Job, mesh: Mesh) -> None:
    """Raises InputError, with the arithmetic, where rows do not fit the mesh or the model."""
    rows, shards = job.train.global_batch_size // job.train.accumulation, batch_shards(mesh.shape)
    if rows % shards:
        raise InputError(
            f"train.global_batch_size {job.train.global_batch_size} / train.accumulation {job.train.accumulation} = "
            f"{rows} rows a micro-batch, which do not divide over data {mesh.shape['data']} x fsdp "
            f"{mesh.shape['fsdp']} = {shards} devices: {rows} mod {shards} = {rows % shards}. Choose a batch size that "
            f"is a multiple of {shards * job.train.accumulation}, or another mesh."
        )
    if job.data.sequence_length > job.model.max_length:
        raise InputError(
            f"data.sequence_length {job.data.sequence_length} is above model.max_length {job.model.max_length}: the "
            "model has no positions for such rows. Raise the one or lower the other."
        )


def open_dataset(job: Job) -> Dataset:
    """Verify the prepared dataset and plan its batches; process 0 makes a plan that is missing.

    Raises InputError where it is missing, damaged, or does not go with the model.
    """
    directory = job.data.path
    index = read_index(directory)
    check_options(directory, index, job.data, job.tokenizer)
    if index.tokenizer.vocab_size > job.model.vocab_size:
        raise InputError(
            f"model.vocab_size is {job.model.vocab_size}, but the tokenizer of {directory} has "
            f"{index.tokenizer.vocab_size} tokens. Set model.vocab_size to {index.tokenizer.vocab_size} or more."
        )
    splits = sorted({shard.split for shard in index.shards})
    plans = {}
    with refused_by_all("make room, or choose a data.path that can be written to"):
        for split in splits if jax.process_index() == 0 else ():
            verify_shards(directory, index, split)
            plans[split] = _plan(job, index, split)
    for split in splits:
        if split not in plans:
            plans[split] = _plan(job, index, split)
    rows = job.train.global_batch_size
    micro_rows = rows // job.train.accumulation  # what fits the devices while training fits them while scoring
    return Dataset(
        directory=directory,
        index=index,
        tokenizer=load_tokenizer(directory),
        batches=Batches(directory, index, plans["train"], global_batch_size=rows, seed=job.train.seed),
        evaluation=EvaluationBatches(
            directory, index, plans["validation"], global_batch_size=micro_rows, max_rows=job.evaluate.max_rows
        )
        if "validation" in plans and plans["validation"].num_rows
        else None,
    )


def _plan(job: Job, index: Index, split: str) -> Plan:
    return ensure_plan(
        job.data.path, index, split=split, sequence_length=job.data.sequence_length, packing=job.data.packing
    )
