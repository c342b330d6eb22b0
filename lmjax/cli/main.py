"""The command ``lmjax``: what there is, and which exit code each kind of end has.

One module a first word, one function a command, named after its last word: ``lmjax train`` is ``lmjax.cli.train.train``
and ``lmjax data prepare`` is ``lmjax.cli.data.prepare`` (but ``list`` is ``list_``, and ``import`` is ``import_``). A
command is a plain function:

    def train(config: ConfigFile, overrides: Overrides = None, dry_run: Annotated[bool, typer.Option()] = False):
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
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lmjax.cli import checkpoint, convert, data, evaluate, generate, info, plan, report, tokenizer, train
from lmjax.errors import DivergedError, InputError, PreemptedError

COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.train,
    "evaluate": evaluate.evaluate,
    "generate": generate.generate,
    "plan": plan.plan,
    "report": report.report,
    "info": info.info,
}

GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "data": (
        "Turn text into token shards, and look at them.",
        {"prepare": data.prepare, "inspect": data.inspect},
    ),
    "tokenizer": (
        "Train a tokenizer, and see how many tokens a text takes.",
        {"train": tokenizer.train, "report": tokenizer.report},
    ),
    "convert": (
        "Bring Hugging Face models in and out, and compare models.",
        {"import": convert.import_, "export": convert.export, "check": convert.check},
    ),
    "checkpoint": (
        "List and verify the checkpoints of a run.",
        {"list": checkpoint.list_, "verify": checkpoint.verify},
    ),
}
"""First word, what the group is for, and its commands."""

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
"""What an operating system says when the place that the user chose cannot be written, and what to do."""


GOOGLE_PCI_VENDOR = "0x1ae0"
ABSENT_TPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
"""What keeps libtpu, which is installed for ahead-of-time compiles, from complaining that this machine has no TPU."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code that its end has.

    ``--debug`` may stand anywhere: the traceback of an error is then printed before its message.
    """
    if not any(file.read_text().strip() == GOOGLE_PCI_VENDOR for file in Path("/sys/bus/pci/devices").glob("*/vendor")):
        for name, value in ABSENT_TPU.items():
            os.environ.setdefault(name, value)
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
    for name, command in COMMANDS.items():
        app.command(name)(command)
    for word, (purpose, commands) in GROUPS.items():
        group = typer.Typer(help=purpose, **settings)
        group.callback()(_group)
        for name, command in commands.items():
            group.command(name)(command)
        app.add_typer(group, name=word)
    return app


def _root(debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")] = False) -> None:
    """Train language models with JAX on TPU pods and GPUs."""


def _group() -> None:
    """Holds a group of commands, even of one, under its word."""


def _end(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"lmjax: {message}", file=sys.stderr)
    sys.exit(code)
