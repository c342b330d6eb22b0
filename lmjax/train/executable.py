"""The compiled step of a run in a file: made where there is time, loaded where devices are paid by the hour.

A file is of one program (its StableHLO), the versions and options that compiled it and the devices that it is laid out
for; for anything else it is refused. JAX unpickles what is in it: load files of your own.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from lmjax.errors import InputError
from lmjax.hardware import hardware
from lmjax.paths import as_path, reaching
from lmjax.train.provenance import installed
from lmjax.xla_flags import Value, flags_for

FORMAT = 2
COMPILERS = {
    "cpu": ("jax", "jaxlib"),
    "gpu": ("jax", "jaxlib", "jax-cuda13-pjrt", "jax-cuda13-plugin"),
    "tpu": ("jax", "jaxlib", "libtpu"),
}
"""The packages that make machine code for a platform."""
ENVIRONMENT = {"cpu": ("XLA_FLAGS",), "gpu": ("XLA_FLAGS",), "tpu": ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
"""Variables from which its compiler takes options of the whole process."""
HARMLESS = ("--xla_dump_", "--xla_force_host_platform_device_count")
"""What such options begin with that change no machine code."""


def program_hash(lowered: jax.stages.Lowered) -> str:
    """SHA-256 of the program before it is compiled."""
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def about(lowered: jax.stages.Lowered, mesh: Mesh, asked: Mapping[str, Value | None]) -> dict[str, Any]:
    """What a compiled step is of: program, versions, the process's own options of the compiler, devices in the order of
    the mesh, and flags with those asked for.

    Raises InputError as ``flags_for``.
    """
    device = mesh.devices.flat[0]
    platform = hardware(device).platform
    return {
        "format": FORMAT,
        "program": program_hash(lowered),
        "versions": installed(COMPILERS[platform]),
        "environment": {
            name: [word for word in os.environ.get(name, "").split() if not word.startswith(HARMLESS)]
            for name in ENVIRONMENT[platform]
        },
        "device": device.device_kind,
        "devices": [each.id for each in mesh.devices.flat],
        "flags": flags_for(hardware(device), asked),
    }


def save_executable(file: str, compiled: jax.stages.Compiled, what: dict[str, Any]) -> None:
    """``what`` is what ``about`` says. Raises InputError where there is a file already."""
    path = as_path(file)
    payload, _, _ = serialize_executable.serialize(compiled)
    with reaching(path):
        if path.exists():
            raise InputError(f"{file}: is there already; name another file")
        with path.open("wb") as out, zipfile.ZipFile(out, "w") as archive:  # machine code hardly compresses
            archive.writestr("about.json", json.dumps(what, indent=1))
            archive.writestr("executable", payload)


def load_executable(
    file: str, lowered: jax.stages.Lowered, mesh: Mesh, asked: Mapping[str, Value | None]
) -> jax.stages.Compiled:
    """The compiled step, to be called like ``lowered.compile()``.

    Raises InputError for a file that is none of these, and for one of another program, compiler or set of devices.
    """
    path = as_path(file)
    found, payload = _read(path)
    wanted = about(lowered, mesh, asked)
    differences = [name for name in wanted if found.get(name) != wanted[name]]
    if differences:
        told = "; ".join(f"{name} {_short(found.get(name))}, here {_short(wanted[name])}" for name in differences)
        raise InputError(
            f"{file}: compiled for something else ({told}). Compile this run's step again with `lmjax plan CONFIG "
            "--topology T --compile --executable FILE` on the versions that are here, or leave --executable out."
        )
    return serialize_executable.deserialize_and_load(
        payload,
        lowered.in_tree,
        lowered.out_tree,
        backend=mesh.devices.flat[0].client,
        execution_devices=list(mesh.devices.flat),
    )


def _read(path: epath.Path) -> tuple[dict[str, Any], bytes]:
    with reaching(path):
        if not path.exists():
            raise InputError(f"{path}: no such file; `lmjax plan ... --compile --executable {path}` writes it")
        try:
            with path.open("rb") as opened, zipfile.ZipFile(opened) as archive:
                return json.loads(archive.read("about.json")), archive.read("executable")
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise InputError(
                f"{path}: not a compiled step ({error}). `lmjax plan ... --compile --executable FILE` writes one."
            ) from error


def _short(value: Any) -> str:
    """Of a hash or a long list, what tells it from another."""
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} from {value[0]} to {value[-1]}"
    return value[:12] if isinstance(value, str) else str(value)
