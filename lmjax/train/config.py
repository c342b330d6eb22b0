"""The config sections of a run that belong to its loop."""

import dataclasses
from typing import Literal

from lmjax.models.remat import RematConfig
from lmjax.schema import UserPath, config_class

AttentionKernel = Literal["auto", "reference", "chunked", "splash", "flash_tpu", "flash_hopper", "cudnn"]
"""``auto``, and the names of ``lmjax.ops.attention_kernels.KERNELS``."""
ExpertExchange = Literal["auto", "gather", "ragged"]


@config_class
class TrainConfig:
    """What is trained, how long, and how a step is carried out."""

    steps: int
    """Updates in all."""
    global_batch_size: int
    """Sequences in an update, over all devices and micro-batches."""
    accumulation: int = 1
    """Micro-batches of an update, one after the other; micro-batch a has the rows r with r mod this = a."""
    init_from: UserPath | None = None
    """A run, a checkpoint, an imported model or a Hugging Face directory whose parameters are the initial ones."""
    seed: int = 0
    """Seed of the initial parameters, where they are drawn, and of the order of the data."""
    z_loss: float = 0.0
    """Weight of logsumexp(logits)^2 in the loss (arXiv 2204.02311, section 5)."""
    loss_chunk_tokens: int = 1024
    """Tokens of a device whose logits exist at the same time."""
    remat: RematConfig = RematConfig()
    """What the backward pass finds saved."""
    moments_on_host: bool = False
    """Whether the optimizer's moments are in the memory of the devices' hosts, from which each update fetches them."""
    scan_layers: bool = True
    """Compile one block and scan over the layers, or compile every block."""
    attention_kernel: AttentionKernel = "auto"
    """Attention kernel by name; auto takes the best one that is proved for the hardware."""
    expert_exchange: ExpertExchange = "auto"
    """How tokens reach experts on other devices where none is dropped: gather brings all tokens to all of them, ragged
    sends each to its own; auto takes what sends less on the hardware."""
    xla_flags: dict[str, bool | int | str | None] = dataclasses.field(default_factory=dict)
    """Options of XLA's compiler for the step, over those that lmjax has for the hardware; null leaves one out."""
    log_batch_hash: bool = False
    """Whether metrics.jsonl has a digest of every global batch."""

    def __post_init__(self) -> None:
        if self.init_from == "":
            raise ValueError("init_from is empty; name a model, or leave it out")
        for name in ("steps", "global_batch_size", "accumulation", "loss_chunk_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be 1 or more")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it has to be at least 0 and below 2^32")
        if self.z_loss < 0:
            raise ValueError(f"z_loss is {self.z_loss}; it has to be 0 or more")
        if self.global_batch_size % self.accumulation:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} does not divide into accumulation {self.accumulation} "
                f"micro-batches: {self.global_batch_size} mod {self.accumulation} = "
                f"{self.global_batch_size % self.accumulation}"
            )


@config_class
class EarlyStoppingConfig:
    """Ends a run whose evaluation loss no longer falls. It decides by the rows of metrics.jsonl and by nothing else."""

    patience: int
    """Evaluations in a row without an improvement after which the run is saved and ends."""
    min_delta: float = 0.0
    """Nats by which an evaluation loss has to be below the best one before it to be an improvement."""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience is {self.patience}; it has to be 1 or more")
        if self.min_delta < 0:
            raise ValueError(f"min_delta is {self.min_delta}; it has to be 0 or more")


@config_class
class EvaluateConfig:
    """The loss on held-out rows, and samples, while training; both also before the first and after the last step."""

    every_steps: int = 500
    """Updates between two evaluations."""
    max_rows: int = 256
    """Rows of the validation split that are scored, evenly spread over it."""
    prompts: tuple[str, ...] = ()
    """Texts that are continued after every evaluation, into samples.jsonl."""
    sample_tokens: int | None = None
    """Tokens of each continuation; 64 by default."""
    temperature: float | None = None
    """Temperature of the samples; 0 takes the most probable token. 0.8 by default."""
    early_stopping: EarlyStoppingConfig | None = None
    """When the run ends before train.steps; null trains to the end."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "max_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be 1 or more")
        for name in ("sample_tokens", "temperature"):
            if getattr(self, name) is not None and not self.prompts:
                raise ValueError(f"{name} has an effect with prompts only, and there are none")
        if self.sample_tokens is not None and self.sample_tokens < 1:
            raise ValueError(f"sample_tokens is {self.sample_tokens}; it has to be 1 or more")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it has to be 0 or more")


@config_class
class WandbConfig:
    """A run on Weights & Biases, beside the files of the run's directory; needs the extra ``wandb``."""

    project: str
    """Name of the project."""
    name: str | None = None
    """Name of the run; null takes the last part of run_dir."""
    entity: str | None = None
    """User or team that owns the project; null takes the account's default."""
    mode: Literal["online", "offline"] = "online"
    """Send while training, or keep the records under run_dir/wandb for `wandb sync`."""

    def __post_init__(self) -> None:
        for name in ("project", "name", "entity"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is empty; name one, or leave it out")


@config_class
class LoggingConfig:
    """What a run writes down."""

    every_steps: int = 1
    """Updates between two rows of metrics.jsonl."""
    progress: Literal["auto", "bar", "lines"] = "auto"
    """A live bar, plain lines, or a bar where the output is a terminal."""
    profile_steps: tuple[int, int] | None = None
    """First and last update of which the first process keeps a profiler trace, in run_dir/profile; null keeps none."""
    wandb: WandbConfig | None = None
    """Where the metrics go on Weights & Biases; null sends nothing."""

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"every_steps is {self.every_steps}; it has to be 1 or more")
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(
                f"profile_steps is {list(self.profile_steps)}; it has to be a first update, counted from 1, and a last "
                "one that is not before it"
            )
