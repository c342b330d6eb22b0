"""The command line, run in the process of a test."""

from lmjax.cli.main import main


def lmjax(*arguments: str) -> int:
    """The exit code of a command, run in this process."""
    try:
        main(arguments)
    except SystemExit as end:
        return 0 if end.code is None else int(end.code)
    return 0
