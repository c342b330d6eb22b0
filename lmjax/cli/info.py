"""``lmjax info``: what this machine runs lmjax with."""

import importlib.metadata
import platform
from typing import Any

from lmjax.cli.arguments import AsJson
from lmjax.cli.table import print_json, print_table

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu")


def info(json: AsJson = False) -> None:
    """Show versions, devices, and which attention kernels there are.

    Example: lmjax info --json
    """
    found = {"versions": versions(), "devices": devices(), "kernels": kernels()}
    if json:
        print_json(found)
        return
    print_table("Versions", ("package", "version"), found["versions"].items())
    print_table("Devices", ("platform", "kind", "count"), [row.values() for row in found["devices"]])
    print_table("Attention kernels", ("kernel", "hardware", "features"), [row.values() for row in found["kernels"]])


def versions() -> dict[str, str | None]:
    """The version of lmjax, of Python and of what decides numbers; None for what is not installed."""
    from lmjax import __version__

    found: dict[str, str | None] = {"lmjax": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def devices() -> list[dict[str, Any]]:
    """How many devices of each kind JAX sees, over all processes."""
    import collections

    import jax

    counts = collections.Counter((device.platform, device.device_kind) for device in jax.devices())
    return [{"platform": where, "kind": kind, "count": count} for (where, kind), count in sorted(counts.items())]


def kernels() -> list[dict[str, Any]]:
    return []
