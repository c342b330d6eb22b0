"""``lmjax info``: what this machine runs lmjax with."""

import collections
import importlib.metadata
import platform
from typing import Any

from lmjax.cli.arguments import AsJson
from lmjax.cli.table import print_json, print_table

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu")


def info(as_json: AsJson = False) -> None:
    """Show versions, devices, and which attention kernels there are.

    Example: lmjax info --json
    """
    found = {"versions": versions(), "devices": devices(), "kernels": kernels()}
    if as_json:
        print_json(found)
        return
    print_table("Versions", ("package", "version"), found["versions"].items())
    print_table("Devices", ("platform", "kind", "count"), [tuple(row.values()) for row in found["devices"]])
    rows = [
        (row["kernel"], *map(", ".join, (row["hardware"], row["features"])), row["summary"]) for row in found["kernels"]
    ]
    print_table("Attention kernels", ("kernel", "hardware", "features", "what it is"), rows)


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
    import jax

    counts = collections.Counter((device.platform, device.device_kind) for device in jax.devices())
    return [{"platform": where, "kind": kind, "count": count} for (where, kind), count in sorted(counts.items())]


def kernels() -> list[dict[str, Any]]:
    """The attention kernels that ``train.attention_kernel`` may name, and what each can do."""
    from lmjax.ops.attention import KERNELS

    return [
        {
            "kernel": name,
            "hardware": sorted(kernel.platforms),
            "features": sorted(kernel.features),
            "summary": kernel.summary,
        }
        for name, kernel in KERNELS.items()
    ]
