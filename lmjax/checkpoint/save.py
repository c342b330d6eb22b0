"""Saving: Orbax writes asynchronously and atomically, then every file is hashed into the manifest.

A step goes through three states: being written (a directory with Orbax's temporary name, ignored by all readers),
committed (the directory bears the step's number), and saved (its manifest is there). Older steps are removed only then.
In an object store it is uploading instead of committed; ``store`` tells how.
"""

import concurrent.futures
import itertools
import json
import logging
import typing

import jax
import orbax.checkpoint as ocp
from etils import epath

from lmjax.checkpoint import processes, store
from lmjax.checkpoint.layout import absolute, flatten, handler, multiprocessing_options, save_args, split_parts
from lmjax.checkpoint.manifest import (
    MANIFEST,
    FileEntry,
    LeafEntry,
    Manifest,
    describe_files,
    list_steps,
    verify,
    write_manifest,
)
from lmjax.errors import InputError
from lmjax.paths import is_remote
from lmjax.schema import config_class

log = logging.getLogger(__name__)

TEMPORARY = ".orbax-checkpoint-tmp"
# tensorstore gives a status such as RESOURCE_EXHAUSTED as ValueError; a store is an InputError that says what to check
SAVE_ERRORS = (OSError, ValueError, RuntimeError, InputError)

_uploads = itertools.count()


@config_class
class CheckpointConfig:
    """When the state is saved, and how many steps are kept."""

    every_steps: int = 500
    """Updates between two checkpoints; the last step and a stop by a signal are always saved."""
    keep_last: int = 2
    """How many of the newest checkpoints stay on disk."""

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"checkpoint.{name} is {getattr(self, name)}; it must be 1 or more")


class Saver:
    """Saves the state of a run in ``directory``, in the background. End it with ``close``, whatever happens between.

    Every process of the run builds one and calls ``save`` and ``wait`` in the same order; the directory is in an object
    store, or on a disk that all of them see. What goes wrong in the background is raised as InputError by the next
    ``save``, ``wait`` or ``close``; the steps that were saved before stay as they are.
    """

    def __init__(self, directory: str, config: CheckpointConfig) -> None:
        """Create ``directory`` and remove what killed saves left in it. Raises InputError where that is not allowed."""
        self.directory = absolute(directory)
        self._config = config
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None
        self._saved: int | None = None
        self._staging: epath.Path | None = None
        """Where this process writes what it then uploads; None where the directory is on a disk."""
        with processes.refused_by_all("give a directory that can be written to"):
            if is_remote(self.directory):
                self._staging = store.staging_directory(self.directory)
            if jax.process_index() == 0:
                try:
                    _prepare(self.directory)
                except OSError as error:
                    raise InputError(
                        f"{self.directory}: cannot keep checkpoints here: {error}. "
                        "Give a directory that can be written to."
                    ) from error
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._orbax: ocp.AsyncCheckpointer | None = None  # in a store, one for the parts of the first state
        if self._staging is None:
            options = multiprocessing_options()
            self._orbax = ocp.AsyncCheckpointer(handler(options), multiprocessing_options=options)

    def save(self, step: int, state: typing.Any, metadata: dict[str, typing.Any]) -> None:
        """Copy ``state`` off the devices and write it in the background; returns when the caller may donate it.

        Waits for the previous save first, and raises its error. ``state`` is a pytree of jax arrays with a named root
        (a dictionary, a named tuple); ``metadata`` holds JSON values. A step that is on disk and verifies is left as it
        is; a damaged one is replaced.
        """
        self.wait()
        arrays = flatten(state)
        metadata = json.loads(json.dumps(metadata))  # the caller may change its dictionary while this is being written
        is_saved = False
        with processes.refused_by_all("fix the cause, then start the same command again"):
            if jax.process_index() == 0:
                is_saved = self._is_saved(step)
                if not is_saved and self._staging:
                    store.begin_upload(self.directory / str(step))
        if processes.share(is_saved):
            log.info("checkpoint %d is already in %s", step, self.directory)
            return
        leaves = {name: LeafEntry(array.shape, array.dtype.name) for name, array in arrays.items()}
        items = {
            part: ocp.args.PyTreeSave(of_part, {name: save_args(array) for name, array in of_part.items()})
            for part, of_part in split_parts(arrays).items()
        }
        if self._orbax is None:
            self._orbax = store.writer(items)
        try:
            self._orbax.save((self._staging or self.directory) / str(step), args=ocp.args.Composite(**items))
        except SAVE_ERRORS as error:
            raise self._failed(step, str(error)) from error
        self._pending = step, self._thread.submit(self._finish, step, leaves, metadata)

    def wait(self) -> None:
        """Return when the last save is durable, on every process. Raises InputError where it failed on any of them."""
        if self._pending is None:
            return
        step, cause = self._settle()
        failures = [line for line in processes.gather(None if cause is None else str(cause)) if line]
        if failures:
            raise self._failed(step, "; ".join(dict.fromkeys(failures))) from cause
        self._saved = step

    def close(self) -> None:
        """Let this process finish its part of the last save, and end the background thread.

        It waits for no other process, so that one which leaves because of an error does leave.
        """
        try:
            if self._pending is not None:
                step, cause = self._settle()
                if cause is not None:
                    raise self._failed(step, str(cause)) from cause
        finally:
            self._thread.shutdown()
            if self._orbax is not None:
                self._orbax.close()

    def _settle(self) -> tuple[int, Exception | None]:
        """The step that was pending, and what went wrong with it in this process."""
        assert self._pending is not None
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except SAVE_ERRORS as error:
            return step, error
        return step, None

    def _finish(self, step: int, leaves: dict[str, LeafEntry], metadata: dict[str, typing.Any]) -> None:
        directory = self.directory / str(step)
        files = self._write(step, directory)
        if jax.process_index() == 0:
            write_manifest(directory, Manifest(step=step, metadata=metadata, leaves=leaves, files=files))
            if self._staging:
                store.end_upload(directory)
            _remove_old(self.directory, step, self._config.keep_last)

    def _write(self, step: int, directory: epath.Path) -> dict[str, FileEntry]:
        """Put all that Orbax writes where it stays; on process 0, the files."""
        assert self._orbax is not None
        if self._staging is None:
            self._orbax.wait_until_finished()
            return describe_files(directory) if jax.process_index() == 0 else {}
        staged, key, ours = self._staging / str(step), f"{next(_uploads)}/{step}", None
        try:
            self._orbax.wait_until_finished()
            ours = store.upload_part(staged, directory)
        finally:
            store.tell(key, ours)  # of a failure too: process 0 would wait
            staged.rmtree(missing_ok=True)
        assert ours is not None
        return store.collect(key, ours)

    def _is_saved(self, step: int) -> bool:
        if step == self._saved:
            return True
        if step not in list_steps(self.directory):
            return False
        problems = verify(self.directory, step).problems
        if problems:
            log.warning("checkpoint %d in %s is damaged and is replaced: %s", step, self.directory, problems[0])
            _remove_step(self.directory / str(step))
        return not problems

    def _failed(self, step: int, why: str) -> InputError:
        steps = [found for found in list_steps(self.directory) if (self.directory / str(found) / MANIFEST).exists()]
        return InputError(
            f"{self.directory}: saving checkpoint {step} failed: {why}\n"
            f"Saved checkpoints, untouched: {', '.join(map(str, steps)) or 'none'}. "
            "Make room or fix the cause, then start the same command again: it removes what is half-written "
            "and resumes from the newest one."
        )


def _prepare(directory: epath.Path) -> None:
    """Make sure that ``directory`` can be written to, and remove what killed saves left in it."""
    if is_remote(directory):
        store.check_writable(directory)
        leftovers = store.unfinished(directory)
    else:
        directory.mkdir(parents=True, exist_ok=True)
        leftovers = [path for path in directory.iterdir() if TEMPORARY in path.name]
    for path in leftovers:
        log.warning("removing %s: the save was stopped before it was finished", path)
        _remove_step(path)


def _remove_old(directory: epath.Path, saved: int, keep_last: int) -> None:
    """Remove the steps before ``saved`` that are not among the newest ``keep_last`` with a manifest."""
    older = [step for step in list_steps(directory) if step < saved]
    complete = [step for step in older if (directory / str(step) / MANIFEST).exists()]
    keep = complete[max(0, len(complete) - keep_last + 1) :]
    for step in older:
        if step not in keep:
            _remove_step(directory / str(step))


def _remove_step(step_directory: epath.Path) -> None:
    """Remove a step, whole or not."""
    if is_remote(step_directory):
        store.remove_step(step_directory)
        return
    (step_directory / MANIFEST).unlink(missing_ok=True)  # first: half a step must not look like one
    step_directory.rmtree()
