"""What a run was made with: the commit of lmjax, versions and devices, in ``run.json``, one entry for each start."""

import collections
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

import lmjax
from lmjax.errors import InputError
from lmjax.paths import as_path, reaching

FILE = "run.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu")


class Commit(NamedTuple):
    """The state of lmjax's own work tree."""

    commit: str
    dirty: bool
    """Whether a file differed from the commit, or was new and not ignored."""


def versions() -> dict[str, str | None]:
    """The version of lmjax, of Python and of what decides numbers; None for what is not installed."""
    return {"lmjax": lmjax.__version__, "python": platform.python_version(), **installed(PACKAGES)}


def installed(packages: Sequence[str]) -> dict[str, str | None]:
    """The version of each; None for what is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def devices() -> list[dict[str, Any]]:
    """How many devices of each kind JAX sees, over all processes."""
    counts = collections.Counter((device.platform, device.device_kind) for device in jax.devices())
    return [{"platform": where, "kind": kind, "count": count} for (where, kind), count in sorted(counts.items())]


def commit_of(package: Path) -> Commit | None:
    """The commit that the files in ``package`` are of; None where they are not tracked by git, or there is no git."""
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None  # the repository around an installed package is not the package's
    commit, changes = _git(package, "rev-parse", "HEAD"), _git(package, "status", "--porcelain")
    return None if commit is None or changes is None else Commit(commit.strip(), bool(changes.strip()))


def record_start(run_dir: Path, step: int, dataset: str) -> str:
    """Append this start, after ``step`` finished updates on a dataset of this fingerprint; the id that the run has.

    Raises InputError for a file that cannot be read.
    """
    path = run_dir / FILE
    record = read(run_dir) or {"id": uuid.uuid4().hex[:12], "starts": []}
    commit = commit_of(Path(lmjax.__file__).parent)
    start = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "dataset": dataset,
        "commit": None if commit is None else commit.commit,
        "dirty": None if commit is None else commit.dirty,
        "versions": versions(),
        "system": platform.platform(),
        "devices": devices(),
        "processes": jax.process_count(),
    }
    record["starts"].append(start)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return record["id"]


def read(run_dir: epath.PathLike) -> dict[str, Any] | None:
    """The ``id`` of a run and its ``starts``; None where there is no such file. Raises InputError for a broken one."""
    path = as_path(run_dir) / FILE
    with reaching(path):
        if not path.exists():
            return None
    try:
        record = json.loads(path.read_bytes())
        if isinstance(record["id"], str) and all(isinstance(start, dict) for start in record["starts"]):
            return record
        problem = "not an id and a list of starts"
    except (ValueError, KeyError, TypeError) as error:
        problem = repr(error)
    raise InputError(f"{path}: not the record of a run ({problem}). Move it away; the next start writes a new one.")


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        ended = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return ended.stdout if ended.returncode == 0 else None
