"""A run's configs, checked against each other, and what they are built into before the first step."""

import dataclasses
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from lmjax.checkpoint.processes import first_on_machine, refused_by_all
from lmjax.checkpoint.save import CheckpointConfig
from lmjax.data.batches import Batches, EvaluationBatches
from lmjax.data.config import DataConfig
from lmjax.data.index import Index, fingerprint, read_index
from lmjax.data.plans import ensure_plans
from lmjax.data.prepare import check_options
from lmjax.data.remote import local_dataset
from lmjax.data.shards import verify_shards
from lmjax.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer
from lmjax.errors import InputError
from lmjax.hardware import Hardware, hardware
from lmjax.mesh import BATCH_AXES, MeshConfig, batch_shards, make_mesh
from lmjax.models.decoder import DecoderConfig, Execution
from lmjax.ops.attention_kernels import Choice, choose_kernel
from lmjax.ops.cross_entropy import LossOptions
from lmjax.optim import OptimizerConfig
from lmjax.paths import as_path, is_remote
from lmjax.precision import PrecisionConfig
from lmjax.train import provenance
from lmjax.train.config import EvaluateConfig, LoggingConfig, TrainConfig
from lmjax.train.feed import abstract_batch
from lmjax.train.state import Blueprint, make_blueprint
from lmjax.train.step import lower_step


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
    devices = hardware(mesh.devices.flat[0])
    check_shapes(job, mesh)
    check_routing(job, mesh)
    check_steps(job)
    check_moments(job, devices)
    return Program(
        mesh=mesh,
        kernels=choose_kernels(job, devices),
        blueprint=make_blueprint(
            job.model, job.optimizer, job.train.steps, mesh, moments_on_host=job.train.moments_on_host
        ),
        execution=Execution(
            compute_dtype=job.precision.compute_dtype,
            reduce_in_float32=job.precision.reduce_in_float32,
            attention_kernel=job.train.attention_kernel,
            expert_exchange=job.train.expert_exchange,
            hardware=devices,
            remat=job.train.remat,
            scan_layers=job.train.scan_layers,
        ),
        loss=LossOptions(z_loss=job.train.z_loss, chunk_tokens=job.train.loss_chunk_tokens),
    )


def lower_program(job: Job, program: Program) -> jax.stages.Lowered:
    """The step, ready to be compiled; the devices need not be here."""
    config = job.train
    batch = abstract_batch(config.global_batch_size, job.data.sequence_length, config.accumulation, program.mesh)
    return lower_step(program.blueprint, program.execution, program.loss, batch, config.seed)


def choose_kernels(job: Job, devices: Hardware) -> dict[str, Choice]:
    """Raises InputError where the attention kernel that is asked for cannot do what a block needs."""
    return {
        kind: choose_kernel(
            job.train.attention_kernel,
            job.model.wanted_attention(
                kind,
                hardware=devices,
                length=job.data.sequence_length,
                dtype=str(job.precision.compute_dtype),
            ),
        )
        for kind in dict.fromkeys(job.model.layer_pattern)
    }


def check_routing(job: Job, mesh: Mesh) -> None:
    """Raises InputError where the mesh, rows or micro-batches do not fit the model's experts."""
    moe, exchange = job.model.moe, job.train.expert_exchange
    if exchange != "auto" and (moe is None or moe.capacity_factor is not None or mesh.shape["expert"] == 1):
        raise InputError(
            f"train.expert_exchange is {exchange} and has no effect: it is for a model with experts (model.moe) "
            "without a capacity_factor, on a mesh that splits them (mesh.expert). Leave it out."
        )
    if moe is None:
        if mesh.shape["expert"] > 1:
            raise InputError(
                f"mesh.expert is {mesh.shape['expert']} and the model has no experts (model.moe). Set mesh.expert=1, "
                "and mesh.fsdp higher."
            )
        return
    if moe.balance_over == "batch" and job.train.accumulation > 1:
        raise InputError(
            f"model.moe.balance_over is batch and train.accumulation is {job.train.accumulation}: a loss of the batch "
            "as a whole is not the sum of its micro-batches' losses. Set balance_over=sequence or accumulation=1."
        )
    if moe.capacity_factor is not None:
        length, share = job.data.sequence_length, moe.experts_per_token / moe.num_experts
        if (slots := length * share * moe.capacity_factor) < 1:
            raise InputError(
                f"model.moe: {length} tokens x {moe.experts_per_token} choices / {moe.num_experts} experts x "
                f"capacity_factor {moe.capacity_factor} = {slots:.3g}: an expert has room for less than one token of a "
                "sequence. Raise capacity_factor or data.sequence_length."
            )


def check_shapes(job: Job, mesh: Mesh) -> None:
    """Raises InputError, with the arithmetic, where rows do not fit the mesh or the model."""
    rows, shards = job.train.global_batch_size // job.train.accumulation, batch_shards(mesh.shape)
    if rows % shards:
        product = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in BATCH_AXES)
        raise InputError(
            f"train.global_batch_size {job.train.global_batch_size} / train.accumulation {job.train.accumulation} = "
            f"{rows} rows a micro-batch, which do not divide over "
            f"{product} = {shards} devices: {rows} mod {shards} = {rows % shards}. Choose a batch size that "
            f"is a multiple of {shards * job.train.accumulation}, or another mesh."
        )
    if job.data.sequence_length > job.model.max_length:
        raise InputError(
            f"data.sequence_length {job.data.sequence_length} is above model.max_length {job.model.max_length}: the "
            "model has no positions for such rows. Raise the one or lower the other."
        )


def check_moments(job: Job, devices: Hardware) -> None:
    """Raises InputError where the devices' memory is that of their host."""
    if job.train.moments_on_host and devices.platform == "cpu":
        raise InputError(
            "train.moments_on_host has no effect on CPUs, whose memory is the host's. Leave it out; it is for TPUs and "
            "GPUs."
        )


def check_steps(job: Job) -> None:
    """Raises InputError where something is to happen after the last step."""
    steps, warmup, profile = job.train.steps, job.optimizer.warmup_steps, job.logging.profile_steps
    if steps < warmup:
        raise InputError(
            f"train.steps {steps} is below optimizer.warmup_steps {warmup}: the learning rate would never reach its "
            f"peak. Train {warmup} steps or more, or warm up in {steps} or fewer."
        )
    if profile is not None and profile[1] > steps:
        raise InputError(
            f"logging.profile_steps {list(profile)} goes beyond the last update: train.steps is {steps}. Choose "
            f"updates from 1 to {steps}."
        )


def check_dataset(job: Job, index: Index) -> None:
    """Raises InputError where the index of ``data.path`` does not go with the configs."""
    directory = job.data.path
    check_options(directory, index, job.data, job.tokenizer)
    if index.tokenizer.vocab_size > job.model.vocab_size:
        raise InputError(
            f"model.vocab_size is {job.model.vocab_size}, but the tokenizer of {directory} has "
            f"{index.tokenizer.vocab_size} tokens. Set model.vocab_size to {index.tokenizer.vocab_size} or more."
        )
    if job.evaluate.early_stopping is not None and "validation" not in index.splits:
        raise InputError(
            f"evaluate.early_stopping has no effect: {directory} holds no document out, so no loss is evaluated. Leave "
            "it out, or prepare the data with a larger data.validation_fraction."
        )


def check_same_run(job: Job) -> None:
    """Raises InputError where the dataset is not the one that the run was last started with; nothing is written."""
    index = read_index(local_dataset(job.data.path, shards=False))
    check_dataset(job, index)
    record = provenance.read(job.run_dir)
    if record is not None and record["starts"]:
        where = as_path(job.run_dir) / provenance.FILE
        check_fingerprint(record["starts"][-1]["dataset"], index, job.data.path, where)


def check_fingerprint(recorded: str, index: Index, directory: str, where: epath.Path) -> None:
    """Raises InputError where a dataset is not the one that ``where`` was written with."""
    found = fingerprint(index)
    if recorded != found:
        raise InputError(
            f"{where}: trained on the dataset {recorded[:16]}…, but {directory} is {found[:16]}…. Prepare the same "
            "data again, or train in another run_dir."
        )


def open_dataset(job: Job) -> Dataset:
    """Verify the prepared dataset and plan its batches; a plan that is missing is made.

    One process does this for a dataset on a disk, and one a machine for a dataset in an object store, of which each
    machine has a copy.

    Raises InputError where it is missing, damaged, or does not go with the model.
    """
    remote = is_remote(job.data.path)
    first = first_on_machine() if remote else jax.process_index() == 0
    plans = None
    with refused_by_all("make room, or choose a data.path that can be written to"):
        if first:
            data = dataclasses.replace(job.data, path=local_dataset(job.data.path))
            index = read_index(data.path)
            check_dataset(job, index)
            for split in index.splits if not remote else ():  # those of a store were hashed when they were fetched
                verify_shards(data.path, index, split)
            plans = ensure_plans(data, index)
    data = dataclasses.replace(job.data, path=local_dataset(job.data.path, trusted=True))
    directory, index = data.path, read_index(data.path)
    check_dataset(job, index)
    plans = ensure_plans(data, index) if plans is None else plans
    rows = job.train.global_batch_size
    micro_rows = rows // job.train.accumulation  # what fits the devices while training fits them while scoring
    return Dataset(
        directory=directory,
        index=index,
        tokenizer=load_tokenizer(directory),
        batches=Batches(
            directory,
            index,
            plans.train,
            global_batch_size=rows,
            seed=job.train.seed,
            mixture=job.data.mixture,
            steps=job.train.steps,
        ),
        evaluation=EvaluationBatches(
            directory, index, plans.validation, global_batch_size=micro_rows, max_rows=job.evaluate.max_rows
        )
        if plans.validation is not None and plans.validation.num_rows
        else None,
    )
