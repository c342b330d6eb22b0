"""``lmjax report``."""

from typing import Annotated

import typer


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Directories of runs.", show_default=False)],
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Where it is written. [default: report.html of the one run, or comparison.html here]"
        ),
    ] = None,
) -> None:
    """Write a run's report.html, or several runs into the same pictures: curves, last values, samples, configs.

    `lmjax train` writes that of its run at the end; this command does it for a run that is under way or was stopped.

    Example: lmjax report runs/first runs/second --output both.html
    """
    from lmjax.train.report import write_report

    print(write_report(runs, output))
