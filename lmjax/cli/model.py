"""Opening the MODEL of a command: a run directory, or one of its checkpoints."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lmjax.errors import InputError

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run directory, whose newest good checkpoint is taken, or a checkpoint, as runs/x/checkpoints/500.",
        show_default=False,
    ),
]

WHOLE_MACHINE = ("mesh.data=1", "mesh.fsdp=-1", "mesh.tensor=1")
"""The mesh of a run may not exist here; this one does with any number of devices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A trained model on the devices at hand."""

    config: Any
    """The run's RunConfig, with the overrides."""
    blueprint: Any
    """lmjax.train.state.Blueprint."""
    execution: Any
    """lmjax.models.decoder.Execution."""
    params: Any
    tokenizer: Any
    """lmjax.data.tokenizer.Tokenizer."""
    step: int
    """Of the checkpoint."""


def open_model(model: str, overrides: Sequence[str], effective: Sequence[str]) -> OpenModel:
    """Read the parameters of ``model``, verified, onto all devices, over fsdp unless ``overrides`` say otherwise.

    ``effective`` are the config keys (or sections) that the calling command heeds; an override of another is refused.
    The tokenizer is that of the dataset at data.path, which has to be the one that the run was trained on.
    Every process of a mesh calls this. Raises InputError where something is missing, damaged, or does not go together.
    """
    from lmjax.checkpoint.restore import restore
    from lmjax.config import load
    from lmjax.data.index import fingerprint, read_index
    from lmjax.data.remote import local_dataset
    from lmjax.data.tokenizer import load_tokenizer
    from lmjax.mesh import make_mesh
    from lmjax.models.decoder import Execution
    from lmjax.startup import start_distributed
    from lmjax.train.state import make_blueprint

    for override in overrides:
        key = override.partition("=")[0].strip()
        if not any(key == heeded or key.startswith(f"{heeded}.") for heeded in effective):
            raise InputError(f"override {override}: has no effect here; these have: {', '.join(effective)}")
    run, step = _find(model)
    config = load(str(run / "config.yaml"), [*WHOLE_MACHINE, *overrides])
    dataset = local_dataset(config.data.path, shards=False)
    index, tokenizer = read_index(dataset), load_tokenizer(dataset)
    start_distributed()
    mesh = make_mesh(config.mesh)
    blueprint = make_blueprint(config.model, config.optimizer, config.train.steps, mesh)
    restored = restore(run / "checkpoints", blueprint.state.params, step=step, part="params")
    if restored is None:
        raise InputError(f"{run}: the run has saved no checkpoint yet. Train it first, or wait for its first save.")
    if restored.metadata["dataset"] != fingerprint(index):
        raise InputError(
            f"{run / 'checkpoints' / str(restored.step)}: trained on the dataset {restored.metadata['dataset'][:16]}…, "
            f"but {config.data.path} is {fingerprint(index)[:16]}…, whose tokens may mean something else. "
            "Give the right one with data.path=DIR."
        )
    execution = Execution(
        compute_dtype=config.precision.compute_dtype,
        attention_kernel=config.train.attention_kernel,
        platform=mesh.devices.flat[0].platform,
    )
    return OpenModel(
        config=config,
        blueprint=blueprint,
        execution=execution,
        params=restored.state,
        tokenizer=tokenizer,
        step=restored.step,
    )


def _find(model: str) -> tuple[Any, int | None]:
    """The run directory (an epath.Path) that ``model`` is or lies in, and the step that it names."""
    from lmjax.paths import as_path, reaching

    path = as_path(model)
    run = path.parent.parent
    with reaching(path):
        if (path / "config.yaml").exists():
            return path, None
        if path.name.isdecimal() and path.parent.name == "checkpoints" and (run / "config.yaml").exists():
            return run, int(path.name)
        what = "not a model" if path.exists() else "no such directory"
    raise InputError(
        f"{model}: {what}. Give a run directory (with config.yaml), as runs/quickstart, or one of its checkpoints, as "
        "runs/quickstart/checkpoints/500"
    )
