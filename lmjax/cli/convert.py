"""``lmjax convert``: Hugging Face directories in and out, and two models compared."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lmjax.cli.arguments import AsJson
from lmjax.cli.model import ModelArgument
from lmjax.cli.table import print_json, print_table
from lmjax.errors import InputError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SHOWN = 20
"""Of the tensors that differ, how many the table has."""

Budget = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="Memory that may be used besides that of the largest tensor of the files, as 500MB or 4GB.",
    ),
]


def import_(
    source: Annotated[
        str, typer.Argument(metavar="HF_DIR", help="A Hugging Face directory, or a GGUF file.", show_default=False)
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Directory to write; not there yet, or empty.", show_default=False)
    ],
    memory_budget: Budget = "4GB",
) -> None:
    """Turn a Hugging Face model into a checkpoint.

    Every tensor's name, shape and dtype is checked before anything is written. OUT can be given to `lmjax generate`,
    `lmjax evaluate` and train.init_from, and OUT/model.yaml is a `base:` for configs.

    Example: lmjax convert import downloads/Llama-3.2-1B models/llama3_2_1b
    """
    from lmjax.convert.importing import import_model

    budget = parse_size("--memory-budget", memory_budget)
    with _progress("import") as report:
        found = import_model(source, out, memory_budget=budget, progress=report)
    print(
        f"{out}: {found.model_type} model of {found.num_parameters:,} parameters, from {found.source_dtype} to float32"
    )
    if found.left_out:
        print(f"left out: {found.left_out} tensors of layers that predict further tokens, which no decoder here has")


def export(
    model: ModelArgument,
    out: Annotated[
        str, typer.Argument(metavar="HF_DIR", help="Directory to write; not there yet, or empty.", show_default=False)
    ],
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Of the weights; that of the model's own source where there is one, else float32."),
    ] = None,
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest file of weights.")] = "5GB",
    memory_budget: Budget = "4GB",
) -> None:
    """Write a trained model as a directory that transformers loads.

    The model's tokenizer comes along, and a model card (README.md) that says what trained it.

    Example: lmjax convert export runs/quickstart exported/quickstart --dtype bfloat16
    """
    from lmjax.checkpoint.slices import open_step
    from lmjax.convert.exporting import export_model
    from lmjax.convert.source import Source
    from lmjax.convert.weights import open_weights

    sizes = {"shard_bytes": parse_size("--shard-size", shard_size)}
    sizes["memory_budget"] = parse_size("--memory-budget", memory_budget)
    weights = open_weights(model)
    if isinstance(weights, Source):
        raise InputError(f"{model}: a Hugging Face model already; give a run, a checkpoint or an imported model")
    if weights.huggingface is None and "data" not in weights.metadata["config"]:
        raise InputError(
            f"{model}: an imported model whose huggingface/ is not on this machine's disk, and with it the tokenizer. "
            "Copy the directory that `lmjax convert import` wrote to the disk as a whole, and give that"
        )
    with open_step(weights.checkpoints, step=weights.step) as reader, _progress("export") as report:
        extra: dict[str, Any] = {"huggingface": weights.huggingface}
        if weights.huggingface is None:
            extra = _of_run(weights.root, reader)
        found = export_model(reader, weights.config, out, dtype=dtype, progress=report, **sizes, **extra)
    print(
        f"{out}: {found.architecture} of {found.num_parameters:,} parameters, {found.dtype}, {found.num_shards} files"
    )


def check(
    one: Annotated[str, typer.Argument(metavar="A", help="A MODEL, as of `lmjax evaluate`.", show_default=False)],
    other: Annotated[str, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Compare the parameters of two models, bit by bit; exit with 2 where they differ.

    Each is a run, a checkpoint, an imported model or a Hugging Face directory.

    Example: lmjax convert check models/llama3_2_1b downloads/Llama-3.2-1B
    """
    from lmjax.convert.check import compare, joined, shapes_differ
    from lmjax.convert.resemblance import differing_fields

    with contextlib.ExitStack() as stack:
        (first, config), (second, other_config) = (stack.enter_context(_reading(model)) for model in (one, other))
        fields = differing_fields(config, other_config)
        if shapes_differ(config, other_config):
            lines = [f"  model.{name}: {left!r} and {right!r}" for name, left, right in fields]
            raise InputError("\n".join([f"{one} and {other} have different parameters:", *lines]))
        found = list(joined(compare(first, second, config)))
    differing = [difference for difference in found if difference.count]
    if as_json:
        print_json(
            {
                "tensors": len(found),
                "differing": [difference._asdict() for difference in differing],
                "config": [{"field": name, "a": str(left), "b": str(right)} for name, left, right in fields],
            }
        )
    elif differing:
        rows = [(d.name, f"{d.count:,} of {d.size:,}", f"{d.largest:.3g}") for d in differing[:SHOWN]]
        print_table(f"{one} and {other}", ("tensor", "values that differ", "largest difference"), rows)
    if differing or fields:
        names = "".join(f"\n  model.{name}: {left!r} and {right!r}" for name, left, right in fields)
        raise InputError(f"{one} and {other} differ: {len(differing)} of {len(found)} tensors{names}")
    if not as_json:
        print(f"{one} and {other} are equal: {len(found)} tensors, bit by bit")


def parse_size(option: str, text: str) -> int:
    """A number of bytes. Raises InputError for text that is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS or not (size := int(float(match[1]) * UNITS[match[2].upper()])):
        raise InputError(f"{option} is {text!r}; give a number above 0 with a unit, as 500MB, 4GB or 2GiB")
    return size


@contextlib.contextmanager
def _reading(model: str) -> Iterator[Any]:
    """What gives the parameters of ``model`` in slices, and its config."""
    from lmjax.checkpoint.slices import open_step
    from lmjax.convert.source import Source
    from lmjax.convert.weights import open_weights

    weights = open_weights(model)
    if isinstance(weights, Source):
        yield weights, weights.config
    else:
        with open_step(weights.checkpoints, step=weights.step) as reader:
            yield reader, weights.config


def _of_run(run: Any, reader: Any) -> dict[str, Any]:
    """What a run knows of the model in one of its checkpoints, as ``export_model`` takes it."""
    from lmjax.convert.card import Training
    from lmjax.convert.tokenizer import huggingface_files
    from lmjax.convert.weights import open_weights
    from lmjax.data.remote import local_dataset
    from lmjax.data.tokenizer import load_tokenizer
    from lmjax.train.records import read_records

    config = reader.metadata["config"]
    tokenizer = load_tokenizer(local_dataset(config["data"]["path"], shards=False))
    records = read_records(run)
    start = config["train"].get("init_from")
    scored = [row for row in records.evaluation if row["step"] == reader.step]
    training = Training(
        started_from=start,
        steps=reader.step,
        tokens=int(reader.metadata["tokens"]),
        losses={"held-out text": scored[-1]["eval_loss"]} if scored else {},
        commit=records.starts[-1]["commit"] if records.starts else None,
        config=records.config,
    )
    named = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    extra: dict[str, Any] = {
        "training": training,
        "files": huggingface_files(tokenizer),
        "special_tokens": {name: number for name, number in named.items() if number is not None},
    }
    if start is not None:
        with contextlib.suppress(InputError):  # it may be gone: the run has all that it needs
            source = open_weights(start).huggingface
            if source is not None and source.is_dir():
                extra["huggingface"] = Path(source)
    return extra


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of bytes on a terminal, nothing elsewhere."""
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
