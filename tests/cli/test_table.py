"""Tables for people, JSON for programs."""

import json

import pytest

from lmjax.cli.table import print_json, print_table

pytestmark = pytest.mark.fast


def test_a_table_shows_every_value_whole(capsys):
    print_table("Leaves", ("leaf", "bytes", "why"), [("x" * 300, 1234567, None), ("[bold]y[/bold]", 2, True)])
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("Leaves", "leaf", "x" * 300, "1,234,567", " - ", "[bold]y[/bold]", "True"))


def test_json_is_one_line_that_reads_back(capsys):
    value = {"a": [1, 2.5, None], "b": "\u00e9\n"}
    print_json(value)
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1
    assert json.loads(shown) == value
    with pytest.raises(ValueError, match="JSON"):
        print_json(float("nan"))
