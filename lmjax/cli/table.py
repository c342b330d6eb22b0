"""How commands print: a table for people, one JSON object for programs."""

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

UNBOUNDED_WIDTH = 10_000


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print ``rows`` under ``columns`` on stdout; numbers to the right, None as a dash.

    In a pipe lines are as long as they need to be, so that ``grep`` finds whole values.
    """
    rows = [list(row) for row in rows]
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        numeric = any(isinstance(row[number], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_text(value) for value in row))
    console = Console(width=None if sys.stdout.isatty() else UNBOUNDED_WIDTH, highlight=False)
    console.print(table, markup=False)


def print_json(value: Any) -> None:
    """Print ``value`` as one JSON object on one line of stdout."""
    print(json.dumps(value, allow_nan=False))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
