"""``lmjax checkpoint``: list the checkpoints of a run, and verify that no byte of them has changed."""

from typing import Annotated

import typer

from lmjax.cli.arguments import AsJson
from lmjax.cli.table import print_json, print_table

Directory = Annotated[
    str,
    typer.Argument(metavar="DIR", help="A run directory, or its directory of checkpoints.", show_default=False),
]


def list_(directory: Directory, as_json: AsJson = False) -> None:
    """List the saved steps, their size, and whether each save was finished. Nothing is hashed.

    Example: lmjax checkpoint list runs/quickstart
    """
    from lmjax.checkpoint.manifest import read_manifest
    from lmjax.errors import InputError

    checkpoints, steps = _find(directory)
    rows = []
    for step in steps:
        row = {"step": step, "files": None, "bytes": None, "arrays": None, "problem": None}
        try:
            manifest = read_manifest(checkpoints, step)
        except InputError as error:
            row["problem"] = str(error)
        else:
            row |= {"files": len(manifest.files), "bytes": manifest.num_bytes, "arrays": len(manifest.leaves)}
        rows.append(row)
    if as_json:
        print_json({"directory": checkpoints, "checkpoints": rows})
    else:
        print_table(checkpoints, list(rows[0]), [list(row.values()) for row in rows])


def verify(
    directory: Directory,
    step: Annotated[int | None, typer.Option(help="Only this step.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare every file with the manifest written when it was saved; exit with 2 if a step is not good.

    Example: lmjax checkpoint verify runs/quickstart --step 500
    """
    from lmjax.checkpoint.manifest import verify as verify_step
    from lmjax.errors import InputError

    checkpoints, steps = _find(directory)
    if step is not None and step not in steps:
        raise InputError(
            f"{checkpoints}: no checkpoint of step {step}. Checkpoints here: {', '.join(map(str, steps))}."
        )
    verdicts = [verify_step(checkpoints, found) for found in steps if step is None or found == step]
    if as_json:
        rows = [{"step": v.step, "files": v.num_files, "bytes": v.num_bytes, "problems": v.problems} for v in verdicts]
        print_json({"directory": checkpoints, "checkpoints": rows})
    else:
        rows = [[v.step, v.num_files, v.num_bytes, "\n".join(v.problems) or "none"] for v in verdicts]
        print_table(checkpoints, ["step", "files", "bytes", "problems"], rows)
    bad = [str(verdict.step) for verdict in verdicts if verdict.problems]
    if bad:
        raise InputError(
            f"{checkpoints}: not good: step {', '.join(bad)}. `lmjax train` passes over such a step and resumes "
            "from the newest good one; bring it back from a copy, or remove its directory."
        )


def _find(directory: str) -> tuple[str, list[int]]:
    """The directory of checkpoints that ``directory`` is or has, and its steps."""
    from lmjax.checkpoint.manifest import list_steps
    from lmjax.errors import InputError
    from lmjax.paths import as_path, reaching

    path = as_path(directory)
    with reaching(path):
        checkpoints = str(path / "checkpoints") if (path / "checkpoints").exists() else directory
    steps = list_steps(checkpoints)
    if not steps:
        what = "no checkpoints in it" if path.exists() else "no such directory"
        raise InputError(
            f"{directory}: {what}. Give a run directory, such as runs/quickstart, that has saved a checkpoint."
        )
    return checkpoints, steps
