"""``lmjax data``: turn text into token shards, and look at them."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmjax.cli.arguments import AsJson, ConfigFile, Overrides
from lmjax.cli.table import print_json, print_table

if TYPE_CHECKING:
    from lmjax.data.prepare import Progress


def prepare(config: ConfigFile, overrides: Overrides = None) -> None:
    """Clean, split, tokenize and pack the sources of a config into its dataset directory.

    Killed half-way, the same command goes on; run again on a finished dataset, it says so. A dataset in an object store
    is made on this machine and copied there when it is whole.

    Example: lmjax data prepare configs/quickstart.yaml data.path=data/mine
    """
    from lmjax.config import load
    from lmjax.data.prepare import prepare as prepare_dataset
    from lmjax.data.remote import publish_dataset
    from lmjax.paths import is_remote, working_directory

    run = load(config, overrides or [])
    directory = str(working_directory(run.data.path))
    with _progress() as report:
        prepare_dataset(dataclasses.replace(run.data, path=directory), run.tokenizer, progress=report)
    if is_remote(run.data.path):
        publish_dataset(directory, run.data.path)


@contextlib.contextmanager
def _progress() -> "Iterator[Callable[[Progress], None]]":
    """Show how far a preparation is: a bar on a terminal, else one line a stage."""
    import rich.progress
    from rich.console import Console

    console = Console(stderr=True)
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[counts]}"),
        console=console,
        disable=not console.is_terminal,
    ) as bars:
        tasks = {}

        def report(progress: "Progress") -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, counts="")
                if not console.is_terminal:
                    print(f"{progress.stage} ...", file=sys.stderr)
            counts = f"{progress.documents:,} documents, {progress.tokens:,} tokens" if progress.documents else ""
            bars.update(tasks[progress.stage], completed=progress.done, total=progress.total, counts=counts)

        yield report


def inspect(
    source: Annotated[
        str, typer.Argument(metavar="CONFIG|DIR", help="YAML file of an experiment, or a dataset directory.")
    ],
    overrides: Overrides = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens a row; the config's, or those of the stored plans, if left out.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Rows of the training split to print as text.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Show a dataset's documents, lengths, what best-fit and concat packing cost (by source too), and rows as text.

    Example: lmjax data inspect data/quickstart --sequence-length 512
    """
    from lmjax.data.index import read_index
    from lmjax.data.inspect import QUANTILES, inspect_dataset
    from lmjax.data.plans import stored_plans
    from lmjax.data.remote import local_dataset
    from lmjax.errors import InputError
    from lmjax.paths import is_remote

    if is_remote(source) or Path(source).is_dir():
        if overrides:
            raise InputError(f"{overrides[0]}: overrides apply to a config, and {source} is a dataset directory")
        directory = local_dataset(source)
        plans = stored_plans(directory)
    else:
        from lmjax.config import load

        data = load(source, overrides or []).data
        directory, plans = local_dataset(data.path), [(data.sequence_length, data.packing)]
    index = read_index(directory)
    if not plans and sequence_length is None:
        raise InputError(f"{directory}: no pack plans here that would tell a row's length; give --sequence-length")
    packing = plans[0][1] if plans else "best_fit"
    found = inspect_dataset(
        directory,
        index,
        sequence_lengths=sorted({length for length, _ in plans}) if sequence_length is None else [sequence_length],
        packing=packing,
        num_samples=samples,
    )
    left_out = {
        "duplicate": index.duplicate_documents,
        "empty": index.empty_documents,
        "unreadable": index.num_skipped,
    }
    if as_json:
        print_json(
            {
                "directory": directory,
                "tokenizer": dataclasses.asdict(index.tokenizer),
                "left_out": left_out,
                "skipped": [dataclasses.asdict(entry) for entry in index.skipped],
                "splits": [split._asdict() for split in found.splits],
                "packing": [row._asdict() for row in found.packing],
                "samples": [[piece._asdict() for piece in row] for row in found.samples],
            }
        )
        return
    tokenizer = index.tokenizer
    print(f"{directory}: {tokenizer.kind} tokenizer of {tokenizer.vocab_size:,} tokens")
    print(f"left out: {', '.join(f'{count:,} {reason}' for reason, count in left_out.items())}")
    for entry in index.skipped:
        print(f"  {entry.name}: {entry.reason}")
    print_table(
        "Documents, tokens each",
        ["split", "source", "shards", "documents", "tokens", *(f"{part:.0%}" for part in QUANTILES)],
        [
            [split.split, split.source or "all", *split[2:5], *split.tokens_per_document.values()]
            for split in found.splits
            if split.documents
        ],
    )
    print_table(
        "Packing",
        ["split", "source", "tokens a row", "packing", "rows", "padding", "of all", "documents cut", "targets lost"],
        [[row.split, row.source or "all", *row[2:6], f"{row.padding_fraction:.3%}", *row[7:]] for row in found.packing],
    )
    for number, row in enumerate(found.samples, start=1):
        print(f"\nSample row {number} ({packing}), {sum(piece.length for piece in row)} tokens:")
        for piece in row:
            end = piece.start + piece.length
            print(f"--- document {piece.document}, tokens {piece.start} to {end} of {piece.document_length} ---")
            print(piece.text)
