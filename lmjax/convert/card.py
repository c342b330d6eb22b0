"""The model card of an export: what is known of how the model came to be, and nothing else."""

import dataclasses
from collections.abc import Mapping

import lmjax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What a run knows of a model. What is not known is left out of the card."""

    started_from: str | None = None
    """The model that training began with; None for random parameters."""
    steps: int | None = None
    """Finished updates."""
    tokens: int | None = None
    """Trained on."""
    losses: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Nats a token by what they were measured on, such as ``evaluation``."""
    commit: str | None = None
    """Of lmjax."""
    config: str | None = None
    """The run's config, as YAML."""


def model_card(
    name: str, *, architecture: str, num_parameters: int, dtype: str, source: str | None, training: Training | None
) -> str:
    """README.md as Hugging Face reads it. ``source`` is the model that was converted, where nothing trained it here."""
    commit = f" (commit {training.commit})" if training and training.commit else ""
    rows = [
        ("Architecture", architecture),
        ("Parameters", f"{num_parameters:,}"),
        ("Weights", dtype),
        ("Written by", f"lmjax {lmjax.__version__}{commit}"),
    ]
    if training is None:
        about = f"Converted from {source} by lmjax, without training." if source else "Converted by lmjax."
    elif training.started_from:
        about = f"Trained with lmjax, starting from {training.started_from}."
    else:
        about = "Trained with lmjax from random parameters."
    if training is not None:
        if training.steps is not None:
            rows.append(("Updates", f"{training.steps:,}"))
        if training.tokens is not None:
            rows.append(("Tokens trained on", f"{training.tokens:,}"))
        rows += [(f"Loss ({what}), nats a token", f"{loss:.4f}") for what, loss in training.losses.items()]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    example = (
        "```python\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/of/this/directory")\n```'
    )
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- lmjax\n---",
        f"# {name}",
        about,
        f"| | |\n|---|---|\n{table}",
        example,
    ]
    if training is not None and training.config:
        parts.append(f"## The run's config\n\n```yaml\n{training.config.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
