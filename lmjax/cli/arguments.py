"""Arguments and options that several commands share."""

from typing import Annotated

import typer

ConfigFile = Annotated[
    str, typer.Argument(metavar="CONFIG", help="YAML or gin file of the experiment.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values that replace the file's, as train.steps=100.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
