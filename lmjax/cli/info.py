"""``lmjax info``: what this machine runs lmjax with."""

from typing import Annotated, Any

import typer

from lmjax.cli.arguments import AsJson
from lmjax.cli.table import print_json, print_table

Attention = Annotated[
    bool, typer.Option("--attention", help="Print what each attention kernel has and where it runs, and nothing else.")
]


def info(as_json: AsJson = False, attention: Attention = False) -> None:
    """Show versions, devices, and which attention kernels there are.

    Example: lmjax info --attention
    """
    from lmjax.train.provenance import devices, versions

    found: dict[str, Any] = {} if attention else {"versions": versions(), "devices": devices()}
    found["kernels"] = kernels()
    if as_json:
        print_json(found)
        return
    if attention:
        _print_attention(found["kernels"])
        return
    print_table("Versions", ("package", "version"), found["versions"].items())
    print_table("Devices", ("platform", "kind", "count"), [tuple(row.values()) for row in found["devices"]])
    rows = [(row["kernel"], ", ".join(row["hardware"]), row["summary"]) for row in found["kernels"]]
    print_table("Attention kernels", ("kernel", "hardware", "what it is"), rows)


def kernels() -> list[dict[str, Any]]:
    """The attention kernels that ``train.attention_kernel`` may name, and what each can do."""
    from lmjax.ops.attention_kernels import KERNELS

    return [
        {
            "kernel": name,
            "summary": kernel.summary,
            "hardware": sorted(kernel.hardware),
            "features": sorted(kernel.features),
            "dtypes": sorted(kernel.dtypes),
            "head_dims": kernel.head_dims_text,
            "needs_equal_dims": kernel.needs_equal_dims,
            "length_multiple": kernel.length_multiple,
            "validation": kernel.validation,
            "taken_by_auto": kernel.is_validated,
        }
        for name, kernel in KERNELS.items()
    ]


def _print_attention(rows: list[dict[str, Any]]) -> None:
    """The table turned round: a column for each kernel, a line for each feature."""
    from lmjax.ops.attention_kernels import FEATURES

    lines = [(feature, *("yes" if feature in row["features"] else "" for row in rows)) for feature in sorted(FEATURES)]
    lines += [(name, *(", ".join(row[name]) for row in rows)) for name in ("hardware", "dtypes")]
    lines.append(("head_dim", *(row["head_dims"] for row in rows)))
    lines.append(("values of another length", *("" if row["needs_equal_dims"] else "yes" for row in rows)))
    lines.append(("row's length a multiple of", *(str(row["length_multiple"]) for row in rows)))
    lines.append(("shown by", *(row["validation"] or "" for row in rows)))
    lines.append(("taken by auto", *("yes" if row["taken_by_auto"] else "by name only" for row in rows)))
    print_table("Attention kernels", ("", *(row["kernel"] for row in rows)), lines)
