"""Restoring: verify every file first, then read onto the mesh at hand; fall back to the newest good step, loudly."""

import contextlib
import dataclasses
import logging
import typing

import jax
import orbax.checkpoint as ocp
from etils import epath

from lmjax.checkpoint import processes, store
from lmjax.checkpoint.layout import absolute, flatten, handler, multiprocessing_options, split_parts
from lmjax.checkpoint.manifest import LeafEntry, Manifest, check_files, list_steps, read_manifest, unexpected_files
from lmjax.errors import InputError
from lmjax.paths import is_remote

log = logging.getLogger(__name__)

SHOWN = 5  # of many lines of one kind, how many a message holds


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A step that was not good."""

    step: int
    why: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """A state that was read, and where it is from."""

    step: int
    state: typing.Any
    metadata: dict[str, typing.Any]
    skipped: tuple[Skipped, ...]
    """The newer steps that were not good; empty when the newest one was."""


def restore(
    directory: epath.PathLike, target: typing.Any, *, step: int | None = None, part: str | None = None
) -> Restored | None:
    """The newest good step in ``directory``, with the shardings of ``target``, bit-equal to what was saved on any mesh.

    ``target`` is a pytree of ``jax.ShapeDtypeStruct`` with shardings. With ``part`` (a top-level key such as
    ``params``), it is that part of the state alone, and only its files are verified and read. With ``step`` no other
    step is tried. Collective: every process calls it, each verifies its share of the files (those of a store are all
    fetched, through the cache of its machine), and all take the same step.

    Returns None where there is no checkpoint: no directory, or no committed step in it. Raises InputError where there
    are steps and none is good, and where the arrays are not those of ``target``: neither is ever taken for a start.
    """
    directory = absolute(directory)
    expected = _expected(target, part)
    found = find_good(directory, step, part)
    if found is None:
        return None
    manifest = found.manifest
    _compare(directory / str(manifest.step), manifest, expected, part)
    if found.skipped:
        log.warning("restoring the older checkpoint %d from %s", manifest.step, directory)
    leaves = _read(directory / str(manifest.step), manifest, expected, part)
    state = jax.tree.unflatten(jax.tree.structure(target), leaves)
    return Restored(step=manifest.step, state=state, metadata=manifest.metadata, skipped=found.skipped)


class Found(typing.NamedTuple):
    """A step whose files are what its manifest says."""

    manifest: Manifest
    skipped: tuple[Skipped, ...]


def find_good(directory: epath.Path, step: int | None, part: str | None) -> Found | None:
    """The newest good step, or ``step``, with the files of ``part`` alone verified where one is given; None where there
    are no steps. Collective, as ``restore``. Raises InputError where no step is good."""
    steps: list[int] = processes.share(list_steps(directory))
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise InputError(f"{directory}: no checkpoint of step {step}. Checkpoints here: {there}.")
    skipped: list[Skipped] = []
    for candidate in reversed(steps if step is None else [step]):
        manifest, problems = _verify_together(directory, candidate, part)
        if manifest is not None and not problems:
            return Found(manifest, tuple(skipped))
        more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
        skipped.append(Skipped(candidate, "; ".join(problems[:SHOWN]) + more))
        log.warning("checkpoint %d in %s is not good and is skipped: %s", candidate, directory, skipped[-1].why)
        if manifest is not None and is_remote(directory):
            store.drop_files(manifest.files, _names(manifest, part))
    if not steps:
        return None
    tried = "\n".join(f"  step {bad.step}: {bad.why}" for bad in skipped)
    raise InputError(
        f"{directory}: no good checkpoint, tried:\n{tried}\n"
        "Bring one back from a copy, or move the directory away to start again at step 0."
    )


def _expected(target: typing.Any, part: str | None) -> dict[str, jax.ShapeDtypeStruct]:
    arrays = flatten(target if part is None else {part: target})
    for name, leaf in arrays.items():
        assert getattr(leaf, "sharding", None) is not None, f"the target of {name} has no sharding"
    return arrays


def _verify_together(directory: epath.Path, step: int, part: str | None) -> tuple[Manifest | None, list[str]]:
    """The manifest and what is wrong, found by all processes together: the same on each of them."""
    process, count = jax.process_index(), jax.process_count()
    manifest = None
    try:
        manifest = read_manifest(directory, step)
    except InputError as error:
        problems = [str(error)]
    else:
        names = _names(manifest, part)
        if is_remote(directory):
            problems = store.fetch_files(directory / str(step), manifest.files, names)
        else:
            problems = check_files(directory / str(step), manifest.files, names[process::count])
        if process == 0 and part is None:
            problems += unexpected_files(directory / str(step), manifest.files)
    everyone = sorted({line for lines in processes.gather(problems) for line in lines})
    return manifest, everyone


def _names(manifest: Manifest, part: str | None) -> list[str]:
    """The files that hold what is asked for."""
    return sorted(manifest.files if part is None else manifest.of_part(part))


def _compare(
    step_directory: epath.Path, manifest: Manifest, expected: dict[str, jax.ShapeDtypeStruct], part: str | None
) -> None:
    """Raise InputError, with the first arrays that differ, where the checkpoint does not hold what is expected."""
    saved = {name: leaf for name, leaf in manifest.leaves.items() if part is None or name.split("/")[0] == part}
    wanted = {name: LeafEntry(tuple(leaf.shape), leaf.dtype.name) for name, leaf in expected.items()}
    lines = [
        f"  {name}: {_describe(saved.get(name))} in the checkpoint, {_describe(wanted.get(name))} wanted"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]
    if lines:
        more = f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise InputError(
            f"{step_directory}: {len(lines)} arrays of this checkpoint are not those of the model and optimizer:\n"
            + "\n".join(lines[:SHOWN])
            + more
            + "\nUse the config that it was saved with, or another run directory."
        )


def _describe(leaf: LeafEntry | None) -> str:
    return "none" if leaf is None else f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _read(
    step_directory: epath.Path, manifest: Manifest, expected: dict[str, jax.ShapeDtypeStruct], part: str | None
) -> list[jax.Array]:
    items = {
        part: ocp.args.PyTreeRestore(
            item=of_part,
            restore_args={
                name: ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=leaf.sharding, dtype=leaf.dtype)
                for name, leaf in of_part.items()
            },
        )
        for part, of_part in split_parts(expected).items()
    }
    with contextlib.ExitStack() as stack:
        options = multiprocessing_options()
        if is_remote(step_directory):
            options = store.multiprocessing_options()
            step_directory = stack.enter_context(store.fetched(manifest.files, _names(manifest, part)))
        checkpointer = stack.enter_context(ocp.Checkpointer(handler(options), multiprocessing_options=options))
        read = checkpointer.restore(step_directory, args=ocp.args.Composite(**items))
    return [read[name.split("/")[0]][name] for name in expected]
