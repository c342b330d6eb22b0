"""The config of a run: one section a component."""

from collections.abc import Sequence

from lmjax.checkpoint.save import CheckpointConfig
from lmjax.config.typed import load_as
from lmjax.data.config import DataConfig
from lmjax.data.tokenizer import TokenizerConfig
from lmjax.mesh import MeshConfig
from lmjax.models.decoder import DecoderConfig
from lmjax.optim import OptimizerConfig
from lmjax.precision import PrecisionConfig
from lmjax.schema import UserPath, config_class
from lmjax.train.config import AttentionKernel, EvaluateConfig, LoggingConfig, TrainConfig


@config_class
class RunConfig:
    """All that a training run depends on."""

    run_dir: UserPath
    """Directory of the run; a run that is there already is gone on with."""
    model: DecoderConfig
    """The decoder's shape."""
    tokenizer: TokenizerConfig
    """How text becomes tokens."""
    data: DataConfig
    """Where the text comes from, and how it becomes rows of tokens."""
    mesh: MeshConfig = MeshConfig()
    """How the devices are used."""
    precision: PrecisionConfig = PrecisionConfig()
    """The dtypes of computation and reduction."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How gradients become updates."""
    train: TrainConfig
    """How long, on how much at once, and how a step is carried out."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the state is saved."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """What is measured while training."""
    logging: LoggingConfig = LoggingConfig()
    """What is written down."""

    def __post_init__(self) -> None:
        if not self.run_dir:
            raise ValueError("run_dir is empty; name a directory, as runs/first")


@config_class
class ModelFile:
    """A file under configs/models: an architecture alone, for experiments to name as their base."""

    model: DecoderConfig
    """The decoder's shape."""


@config_class
class KernelConfig:
    """What of a run's ``train`` section counts without training."""

    attention_kernel: AttentionKernel = "auto"
    """As train.attention_kernel of a run."""


@config_class
class InferenceConfig:
    """How a model that has no run's config is used."""

    mesh: MeshConfig = MeshConfig()
    """How the devices are used."""
    precision: PrecisionConfig = PrecisionConfig()
    """The dtypes of computation."""
    train: KernelConfig = KernelConfig()
    """The attention kernel."""


def load(file: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of the run that ``file`` and ``overrides`` describe. Raises InputError with all that is wrong."""
    return load_as(RunConfig, file, overrides)


def load_model(file: str, overrides: Sequence[str] = ()) -> DecoderConfig:
    """The architecture in a file that has nothing else."""
    return load_as(ModelFile, file, overrides).model


def load_inference(overrides: Sequence[str]) -> InferenceConfig:
    """The defaults with ``overrides``."""
    return load_as(InferenceConfig, None, overrides)
