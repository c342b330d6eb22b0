"""Exit codes and messages of the command line, its help, and that it starts without JAX."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from lmjax.cli import main as cli
from lmjax.errors import DivergedError, InputError, PreemptedError

ROOT = Path(__file__).parent.parent.parent
WORDS = [[name] for name in cli.COMMANDS] + [[word, name] for word, (_, names) in cli.GROUPS.items() for name in names]


def end(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code if isinstance(caught.value.code, int) else 1


@pytest.fixture
def failing(monkeypatch):
    """Make ``lmjax info`` raise the given error."""

    def failing(error: Exception) -> None:
        def info(sleep: int = 0) -> None:
            raise error

        monkeypatch.setitem(cli.COMMANDS, "info", info)

    return failing


@pytest.mark.fast
@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError("no such thing"), 2), (DivergedError("loss is nan"), 3), (PreemptedError("saved"), 75)],
)
def test_each_of_our_errors_has_its_exit_code_and_one_message(failing, capsys, error, code):
    failing(error)
    assert end(["info"]) == code
    assert capsys.readouterr().err == f"lmjax: {error}\n"


@pytest.mark.fast
@pytest.mark.parametrize("arguments", [["--debug", "info"], ["info", "--debug"]])
def test_debug_shows_the_traceback_as_well(failing, capsys, arguments):
    failing(InputError("no such thing"))
    assert end(arguments) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.endswith("lmjax: no such thing\n")


@pytest.mark.fast
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EACCES, errno.ENOTDIR, errno.EROFS])
def test_a_place_that_cannot_be_written_is_the_users_to_change(failing, capsys, number):
    failing(OSError(number, "Reason", "/some/file"))
    assert end(["info"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("lmjax: /some/file: Reason; ")
    assert shown.count("\n") == 1


@pytest.mark.fast
@pytest.mark.parametrize("error", [RuntimeError("ours"), OSError(errno.EBADF, "ours"), KeyError("ours")])
def test_an_error_that_is_a_defect_keeps_its_traceback(failing, error):
    failing(error)
    with pytest.raises(type(error)):
        cli.main(["info"])


@pytest.mark.fast
@pytest.mark.parametrize(
    "arguments", [["nothing"], ["info", "--nothing"], ["info", "--sleep", "x"], ["data", "nothing"], ["train"]]
)
def test_wrong_usage_is_wrong_input(failing, capsys, arguments):
    failing(RuntimeError("is not reached"))
    assert end(arguments) == 2
    assert "Usage" in capsys.readouterr().err


@pytest.mark.fast
@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_every_command_has_help_with_an_example_of_itself(capsys, words):
    assert end([*words, "--help"]) == 0
    assert f"Example: lmjax {' '.join(words)}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.fast
def test_help_lists_every_command(capsys):
    assert end(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f" {word} " in shown for word in [*cli.COMMANDS, *cli.GROUPS])


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after ``statement``."""
    program = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("statement", ["import lmjax", "from lmjax.cli.main import build; build()"])
def test_starting_imports_nothing_heavy(statement):
    heavy = {"jax", "flax", "numpy", "grain", "orbax", "omegaconf", "sentencepiece", "matplotlib"}
    assert modules_after(statement) & heavy == set()
    assert "numpy" in modules_after("import numpy"), "the same look finds what is there"
