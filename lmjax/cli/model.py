"""Opening the MODEL of a command: a run, one of its checkpoints, an imported model or a Hugging Face directory."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lmjax.errors import InputError

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A run directory, whose newest good checkpoint is taken; a checkpoint, as runs/x/checkpoints/500; what "
        "`lmjax convert import` wrote; a Hugging Face directory; or a GGUF file.",
        show_default=False,
    ),
]

WHOLE_MACHINE = ("mesh.data=1", "mesh.fsdp=-1", "mesh.expert=1", "mesh.tensor=1")
"""The mesh of a run may not exist here; this one does with any number of devices."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A trained model on the devices at hand."""

    config: Any
    """The run's RunConfig, or the InferenceConfig of a model that no run of ours trained, with the overrides."""
    blueprint: Any
    """lmjax.train.state.Blueprint of a run, else PlacedModel."""
    execution: Any
    """lmjax.models.decoder.Execution."""
    params: Any
    tokenizer: Any
    """lmjax.data.tokenizer.Tokenizer."""
    step: int | None
    """Of the checkpoint; None where no run of ours trained the model."""
    end_ids: frozenset[int] = frozenset()
    """Tokens that end a text, besides the tokenizer's EOS."""


FOREIGN = ("mesh", "precision", "train.attention_kernel")
"""Keys that are heeded for a model that no run of ours trained."""


def open_model(model: str, overrides: Sequence[str], effective: Sequence[str]) -> OpenModel:
    """Read the parameters of ``model``, verified, onto all devices, over fsdp unless ``overrides`` say otherwise.

    ``effective`` are the config keys (or sections) that the calling command heeds; an override of another is refused.
    The tokenizer is that of the dataset at data.path, which has to be the one that the run was trained on.
    Every process of a mesh calls this. Raises InputError where something is missing, damaged, or does not go together.
    """
    from lmjax.paths import as_path, reaching

    for override in overrides:
        key = override.partition("=")[0].strip()
        if not any(key == heeded or key.startswith(f"{heeded}.") for heeded in effective):
            raise InputError(f"override {override}: has no effect here; these have: {', '.join(effective)}")
    path = as_path(model)
    step = int(path.name) if path.name.isdecimal() and path.parent.name == "checkpoints" else None
    run = path if step is None else path.parent.parent
    with reaching(path):
        is_run = (run / "config.yaml").exists()
    return _open_run(run, step, overrides) if is_run else _open_foreign(model, overrides)


def _open_run(run: Any, step: int | None, overrides: Sequence[str]) -> OpenModel:
    from lmjax.checkpoint.restore import restore
    from lmjax.config import load
    from lmjax.data.index import fingerprint, read_index
    from lmjax.data.remote import local_dataset
    from lmjax.data.tokenizer import load_tokenizer
    from lmjax.mesh import make_mesh
    from lmjax.startup import start_distributed
    from lmjax.train.state import make_blueprint

    config = load(str(run / "config.yaml"), [*WHOLE_MACHINE, *overrides])
    dataset = local_dataset(config.data.path, shards=False)
    index, tokenizer = read_index(dataset), load_tokenizer(dataset)
    start_distributed()
    mesh = make_mesh(config.mesh)
    blueprint = make_blueprint(config.model, config.optimizer, config.train.steps, mesh)
    restored = restore(run / "checkpoints", blueprint.params, step=step, part="params")
    if restored is None:
        raise InputError(f"{run}: the run has saved no checkpoint yet. Train it first, or wait for its first save.")
    if restored.metadata["dataset"] != fingerprint(index):
        raise InputError(
            f"{run / 'checkpoints' / str(restored.step)}: trained on the dataset {restored.metadata['dataset'][:16]}…, "
            f"but {config.data.path} is {fingerprint(index)[:16]}…, whose tokens may mean something else. "
            "Give the right one with data.path=DIR."
        )
    return OpenModel(
        config=config,
        blueprint=blueprint,
        execution=_execution(config, mesh),
        params=restored.state,
        tokenizer=tokenizer,
        step=restored.step,
    )


def _open_foreign(model: str, overrides: Sequence[str]) -> OpenModel:
    """A model with Hugging Face's tokenizer, used in the dtype of its files unless ``overrides`` say otherwise."""
    from lmjax.config import load_inference
    from lmjax.convert.tokenizer import end_ids_in, tokenizer_in
    from lmjax.convert.weights import open_weights
    from lmjax.mesh import make_mesh
    from lmjax.startup import start_distributed
    from lmjax.train.state import place_model

    for override in overrides:
        key = override.partition("=")[0].strip()
        if not any(key == heeded or key.startswith(f"{heeded}.") for heeded in FOREIGN):
            raise InputError(
                f"override {override}: has no effect on {model}, which no run of lmjax trained; these have: "
                f"{', '.join(FOREIGN)}"
            )
    weights = open_weights(model)
    compute = "bfloat16" if weights.dtype == "bfloat16" else "float32"
    config = load_inference([*WHOLE_MACHINE, f"precision.compute={compute}", *overrides])
    if weights.huggingface is None:
        raise InputError(
            f"{model}: neither a run (it has no config.yaml) nor an imported model whose huggingface/ is on this "
            "machine's disk. Give a run, or the directory that `lmjax convert import` wrote, copied to the disk"
        )
    tokenizer = tokenizer_in(weights.huggingface)
    start_distributed()
    mesh = make_mesh(config.mesh)
    placed = place_model(weights.config, mesh)
    return OpenModel(
        config=config,
        blueprint=placed,
        execution=_execution(config, mesh),
        params=weights.place(placed.params),
        tokenizer=tokenizer,
        step=None,
        end_ids=end_ids_in(weights.huggingface),
    )


def _execution(config: Any, mesh: Any) -> Any:
    from lmjax.hardware import hardware
    from lmjax.models.decoder import Execution

    return Execution(
        compute_dtype=config.precision.compute_dtype,
        attention_kernel=config.train.attention_kernel,
        hardware=hardware(mesh.devices.flat[0]),
    )
