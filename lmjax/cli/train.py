"""``lmjax train``."""

import contextlib
from typing import Annotated

import typer

from lmjax.cli.arguments import AsJson, ConfigFile, Overrides


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option(help="Print every array of the state with its sharding, and train nothing.")
    ] = False,
    executable: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The compiled step that `lmjax plan --compile --executable FILE` wrote."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a model, or go on with a run that was stopped.

    The run's directory is run_dir of the config. Started again, the command resumes from the newest checkpoint.

    Example: lmjax train configs/quickstart.yaml train.steps=100
    """
    from lmjax.checkpoint.processes import refused_by_all
    from lmjax.cli.run_directory import opened_run, to_job
    from lmjax.config import load
    from lmjax.errors import InputError
    from lmjax.startup import start_distributed
    from lmjax.train.job import check_same_run, make_program
    from lmjax.train.loop import load_step, run

    if as_json and not dry_run:
        raise InputError("--json prints the table of --dry-run as one object; give both, or neither")
    if dry_run and executable is not None:
        raise InputError("--executable has no effect with --dry-run, which trains nothing; leave one of them out")
    loaded = load(config, overrides or ())
    start_distributed()
    import jax

    job = to_job(loaded)
    if dry_run:
        print_state(make_program(job).blueprint, as_json)
        return
    step = None if executable is None else load_step(job, executable)  # refused before anything is written, too
    push = None
    with contextlib.ExitStack() as stack:
        with refused_by_all("choose a run_dir that can be written to"):
            if jax.process_index() == 0:
                make_program(job)  # a mesh, a batch or a dataset that cannot be is refused before anything is written
                check_same_run(job)
                push = stack.enter_context(opened_run(loaded)).push
        run(job, push, step)
        if jax.process_index() == 0:
            from lmjax.train.report import write_report  # Matplotlib is not worth waiting for before the first step

            if push is not None:
                push()  # it is read where the run is
            write_report([loaded.run_dir])


def print_state(blueprint, as_json: bool) -> None:
    """Shape, dtype, sharding and bytes a device of every leaf of the state."""
    from lmjax.cli.table import print_json, print_table
    from lmjax.sharding import leaf_report

    leaves = list(leaf_report(blueprint.state._asdict()))
    total = sum(leaf.bytes_per_device for leaf in leaves)
    if as_json:
        print_json({"leaves": [leaf._asdict() for leaf in leaves], "bytes_per_device": total})
        return
    rows = [(leaf.path, str(leaf.shape), leaf.dtype, leaf.spec, leaf.bytes_per_device) for leaf in leaves]
    title = f"State on mesh {dict(blueprint.mesh.shape)}: {total:,} bytes a device"
    print_table(title, ("leaf", "shape", "dtype", "sharding", "bytes a device"), rows)
