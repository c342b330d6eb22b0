"""``lmjax report``."""

from typing import Annotated

import typer


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The directory of a run.", show_default=False)],
) -> None:
    """Write a run's report.html: curves, last values, samples and config in one file.

    `lmjax train` writes it at the end; this command does it for a run that is under way or was stopped.

    Example: lmjax report runs/quickstart
    """
    from lmjax.train.report import write_report

    print(write_report(run))
