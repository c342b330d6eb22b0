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
    from lmjax.data import inspect as inspection
    from lmjax.data.index import read_index
    from lmjax.errors import InputError

    if Path(source).is_dir():
        if overrides:
            raise InputError(f"{overrides[0]}: overrides apply to a config, and {source} is a dataset directory")
        directory, lengths, packing = source, inspection.planned_sequence_lengths(source), "best_fit"
    else:
        from lmjax import config as configs

        data = configs.load(source, overrides or []).data
        directory, lengths, packing = data.path, [data.sequence_length], data.packing
    lengths = [sequence_length] if sequence_length else lengths
    index = read_index(directory)
    splits = inspection.summarize_splits(directory, index)
    packings = [row for length in lengths for row in inspection.summarize_packing(directory, index, length)]
    rows = []
    if samples and lengths:
        rows = inspection.sample_rows(
            directory, index, split="train", sequence_length=lengths[0], packing=packing, num_rows=samples
        )
    if as_json:
        print_json(
            {
                "directory": directory,
                "splits": [split._asdict() for split in splits],
                "packing": [row._asdict() for row in packings],
                "samples": [[piece._asdict() for piece in row] for row in rows],
            }
        )
        return
    parts = [f"{float(part):.0%}" for part in inspection.QUANTILES]
    print_table(
        f"{directory}: tokens per document, by quantile",
        ["split", "shards", "documents", "tokens", *parts],
        [[s.split, s.shards, s.documents, s.tokens, *s.tokens_per_document.values()] for s in splits if s.documents],
    )
    print_table(
        "packing",
        ["split", "tokens a row", "packing", "rows", "padding", "padding %", "documents cut", "targets lost"],
        [
            [
                p.split,
                p.sequence_length,
                p.packing,
                p.rows,
                p.padding,
                f"{p.padding_fraction:.3%}",
                p.documents_cut,
                p.lost_targets,
            ]
            for p in packings
        ],
    )
    for number, row in enumerate(rows, start=1):
        print(f"\nsample row {number} ({packing}, {lengths[0]} tokens a row):")
        for piece in row:
            end = piece.start + piece.length
            print(f"--- document {piece.document}, tokens {piece.start} to {end} of {piece.document_length} ---")
            print(piece.text)
