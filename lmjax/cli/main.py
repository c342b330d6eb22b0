"""The command ``lmjax``: what there is, and which exit code each kind of end has.

One module a first word, one function a command, named after its last word: ``lmjax train`` is ``lmjax.cli.train.train``
and ``lmjax data prepare`` is ``lmjax.cli.data.prepare``. A command is a plain function:

    def train(config: ConfigFile, overrides: Overrides = None, dry_run: Annotated[bool, typer.Option(help="…")] = False):
        \"\"\"One line that the list of commands shows.

        More, if it needs more.

        Example: lmjax train configs/quickstart.yaml train.steps=100
        \"\"\"
        from lmjax import config as configs  # imported here, so that `lmjax --help` does not wait for JAX

Arguments that several commands share are in ``lmjax.cli.arguments``, tables and JSON in ``lmjax.cli.table``. At the top
of a module stand only the standard library, typer and these. A command returns nothing and lets its errors pass: this
module turns ``InputError``, ``DivergedError`` and ``PreemptedError`` into a message and an exit code.
"""

import errno
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from lmjax.errors import DivergedError, InputError, PreemptedError

COMMANDS = {
    "data": ("prepare", "inspect"),
    "tokenizer": ("train",),
    "train": (),
    "evaluate": (),
    "generate": (),
    "checkpoint": ("list", "verify"),
    "report": (),
    "info": (),
}
GROUP_HELP = {
    "data": "Turn text into token shards, and look at them.",
    "tokenizer": "Train a tokenizer.",
    "checkpoint": "List and verify a run's checkpoints.",
}
"""What an operating system says when the place that the user chose cannot be written."""
PLACE_ERRORS = {
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOTDIR: "part of the path is a file; choose another place",
    errno.EISDIR: "the path is a directory; name a file",
    errno.ENOSPC: "free some space or choose another disk, then run the same command again",
    errno.EDQUOT: "free some of your quota or choose another disk, then run the same command again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) or choose another disk, then run the same command again",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code that its end has.

    ``--debug`` may stand anywhere: the traceback of an error is then printed before its message.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        build()(args=[argument for argument in arguments if argument != "--debug"], prog_name="lmjax")
    except (InputError, DivergedError, PreemptedError) as error:
        _end(str(error), error.exit_code, debug)
    except OSError as error:
        if error.errno not in PLACE_ERRORS:
            raise
        where = error.filename2 or error.filename
        _end(f"{f'{where}: ' if where else ''}{error.strerror}; {PLACE_ERRORS[error.errno]}", 2, debug)


def build() -> typer.Typer:
    """The whole command line, as typer holds it."""
    settings: dict[str, Any] = {"no_args_is_help": True, "add_completion": False, "pretty_exceptions_enable": False}
    app = typer.Typer(help="Train language models with JAX on TPU pods and GPUs.", **settings)
    app.callback()(_root)
    for word, names in COMMANDS.items():
        if importlib.util.find_spec(f"lmjax.cli.{word}") is None:
            continue
        module = importlib.import_module(f"lmjax.cli.{word}")
        if not names:
            app.command(word)(getattr(module, word))
            continue
        group = typer.Typer(help=GROUP_HELP[word], **settings)
        group.callback()(_group)
        for name in names:
            group.command(name)(command_function(module, name))
        app.add_typer(group, name=word)
    return app


def command_function(module: Any, name: str) -> Callable[..., None]:
    """The function behind a command; ``list`` is ``list_`` in Python, which has the plain name for itself."""
    return getattr(module, f"{name}_" if name == "list" else name)


def _root(debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False) -> None:
    """Train language models with JAX on TPU pods and GPUs."""


def _group() -> None:
    """Holds a group of commands, even of one, under its word."""


def _end(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"lmjax: {message}", file=sys.stderr)
    sys.exit(code)
