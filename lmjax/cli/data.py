"""``lmjax data``: turn text into token shards, and look at them."""

from pathlib import Path
from typing import Annotated

import typer

from lmjax.cli.arguments import AsJson, ConfigFile, Overrides
from lmjax.cli.table import print_json, print_table


def prepare(config: ConfigFile, overrides: Overrides = None) -> None:
    """Clean, split, tokenize and pack the sources of a config into its dataset directory.

    Killed half-way, the same command goes on; run again on a finished dataset, it says so.

    Example: lmjax data prepare configs/quickstart.yaml data.path=data/mine
    """
    from lmjax import config as configs
    from lmjax.data.prepare import prepare as prepare_dataset

    run = configs.load(config, overrides or [])
    prepare_dataset(run.data, run.tokenizer)


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
    """Show a dataset's documents, lengths, packing and a few rows as text.

    Example: lmjax data inspect data/quickstart --sequence-length 512
    """
    from lmjax.data.index import read_index
    from lmjax.data.inspect import QUANTILES, inspect_dataset
    from lmjax.data.plans import stored_plans
    from lmjax.errors import InputError

    if Path(source).is_dir():
        if overrides:
            raise InputError(f"{overrides[0]}: overrides apply to a config, and {source} is a dataset directory")
        directory, plans = source, stored_plans(source)
    else:
        from lmjax.config import load

        data = load(source, overrides or []).data
        directory, plans = data.path, [(data.sequence_length, data.packing)]
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
    if as_json:
        print_json(
            {
                "directory": directory,
                "splits": [split._asdict() for split in found.splits],
                "packing": [row._asdict() for row in found.packing],
                "samples": [[piece._asdict() for piece in row] for row in found.samples],
            }
        )
        return
    print_table(
        f"{directory}: tokens per document, by quantile",
        ["split", "shards", "documents", "tokens", *(f"{part:.0%}" for part in QUANTILES)],
        [[*split[:4], *split.tokens_per_document.values()] for split in found.splits if split.documents],
    )
    print_table(
        "Packing",
        ["split", "tokens a row", "packing", "rows", "padding", "of all", "documents cut", "targets lost"],
        [[*row[:5], f"{row.padding_fraction:.3%}", *row[6:]] for row in found.packing],
    )
    for number, row in enumerate(found.samples, start=1):
        print(f"\nSample row {number} ({packing}), {sum(piece.length for piece in row)} tokens:")
        for piece in row:
            end = piece.start + piece.length
            print(f"--- document {piece.document}, tokens {piece.start} to {end} of {piece.document_length} ---")
            print(piece.text)
