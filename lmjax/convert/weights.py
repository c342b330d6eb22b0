"""Where a model's parameters are: a run, one of its checkpoints, an imported model, or a Hugging Face directory."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pydantic
from etils import epath

from lmjax.checkpoint.manifest import list_steps, read_manifest
from lmjax.checkpoint.restore import restore
from lmjax.convert.gguf_files import find_gguf
from lmjax.convert.importing import CHECKPOINTS, HUGGING_FACE
from lmjax.convert.settings import CONFIG_FILE
from lmjax.convert.source import Source, open_source
from lmjax.errors import InputError
from lmjax.models.config import DecoderConfig
from lmjax.paths import as_path, is_remote, reaching

KINDS = (
    "a run directory, as runs/quickstart, one of its checkpoints, as runs/quickstart/checkpoints/500, what `lmjax "
    "convert import` wrote, a Hugging Face directory (with config.json), or a GGUF file"
)
"""What a MODEL may be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """A model of ours: a run, or what was imported."""

    root: epath.Path
    step: int | None
    """The step that was named; None takes the newest good one."""
    config: DecoderConfig
    metadata: dict[str, Any]
    """Of the checkpoint that the config is from."""

    @property
    def checkpoints(self) -> epath.Path:
        return self.root / CHECKPOINTS

    @property
    def huggingface(self) -> Path | None:
        """The files of the Hugging Face directory that the model was imported from; None for a run."""
        found = self.root / HUGGING_FACE
        return None if is_remote(self.root) or not found.exists() else Path(found)

    @property
    def dtype(self) -> str:
        """Of the files that it was imported from, or float32."""
        return self.metadata.get("dtype", "float32")

    def place(self, structs: Any) -> Any:
        """The parameters, verified, on devices: ``structs`` is a tree of ShapeDtypeStructs with shardings."""
        restored = restore(self.checkpoints, structs, step=self.step, part="params")
        assert restored is not None, "there was a step when this was opened"
        return restored.state


def open_weights(path: str) -> Source | Saved:
    """Raises InputError where there is no model, or none that was saved, and what ``open_source`` raises."""
    place = as_path(path)
    if (saved := find_saved(place)) is not None:
        return saved
    if not is_remote(place) and ((place / CONFIG_FILE).exists() or find_gguf(Path(place)) is not None):
        return open_source(Path(place))
    what = "not a model" if place.exists() else "no such file or directory"
    raise InputError(f"{path}: {what}. Give {KINDS}")


def find_saved(place: epath.Path) -> Saved | None:
    """The model of ours that is in ``place``, or None. Raises InputError where nothing was saved in it yet."""
    with reaching(place):
        if place.name.isdecimal() and place.parent.name == CHECKPOINTS and place.parent.exists():
            root, step = place.parent.parent, int(place.name)
        elif (place / CHECKPOINTS).exists():
            root, step = place, None
        else:
            return None
        steps = list_steps(root / CHECKPOINTS)
    if not steps:
        raise InputError(f"{place}: no checkpoint was saved yet. Train it first, or wait for its first save")
    if step is not None and step not in steps:
        raise InputError(f"{place}: no checkpoint of step {step}. Checkpoints here: {', '.join(map(str, steps))}")
    manifest = read_manifest(root / CHECKPOINTS, steps[-1] if step is None else step)
    model = json.dumps(manifest.metadata["config"]["model"])
    config = pydantic.TypeAdapter(DecoderConfig).validate_json(model)
    return Saved(root=root, step=step, config=config, metadata=manifest.metadata)
