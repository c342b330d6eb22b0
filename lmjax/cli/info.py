"""``lmjax info``: what this machine runs lmjax with."""

from typing import Any

from lmjax.cli.arguments import AsJson
from lmjax.cli.table import print_json, print_table


def info(as_json: AsJson = False) -> None:
    """Show versions, devices, and which attention kernels there are.

    Example: lmjax info --json
    """
    from lmjax.train.provenance import devices, versions

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
