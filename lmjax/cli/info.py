"""``lmjax info``: what this machine runs lmjax with."""

import functools
from typing import Annotated, Any

import typer

from lmjax.cli.arguments import AsJson
from lmjax.cli.table import print_json, print_table
from lmjax.errors import InputError

Attention = Annotated[
    bool, typer.Option("--attention", help="Print what each attention kernel has and where it runs, and nothing else.")
]


XlaFlags = Annotated[
    bool,
    typer.Option("--xla-flags", help="Print the flags that steps are compiled with, by hardware, and nothing else."),
]


ValidateKernels = Annotated[
    bool,
    typer.Option(
        "--validate-kernels",
        help="Run our attention kernels on the device here beside the reference, and let auto take those that agree.",
    ),
]


def info(
    as_json: AsJson = False,
    attention: Attention = False,
    xla_flags: XlaFlags = False,
    validate_kernels: ValidateKernels = False,
) -> None:
    """Show versions, devices, and which attention kernels there are.

    Example: lmjax info --attention
    """
    asked = {"--attention": attention, "--xla-flags": xla_flags, "--validate-kernels": validate_kernels}
    if sum(asked.values()) > 1:
        both = " and ".join(name for name, is_asked in asked.items() if is_asked)
        raise InputError(f"{both} are for one thing each: ask for one of them at a time")
    if validate_kernels:
        _validate(as_json)
        return
    if xla_flags:
        _print_flags(as_json)
        return
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


def _print_flags(as_json: bool) -> None:
    from lmjax.xla_flags import FLAGS

    if as_json:
        print_json({"xla_flags": [{**flag._asdict(), "hardware": sorted(flag.hardware)} for flag in FLAGS]})
        return
    rows = [(f"{flag.name}={flag.value}", ", ".join(flag.hardware), flag.reason, flag.source) for flag in FLAGS]
    print_table("Flags of XLA's compilers", ("flag", "hardware", "why", "by whom"), rows)


def _validate(as_json: bool) -> None:
    from lmjax.hardware import hardware_here
    from lmjax.ops.attention_kernels import KERNELS
    from lmjax.ops.attention_validation import checks, outcome, record

    here = hardware_here()
    ours = {name: kernel for name, kernel in KERNELS.items() if kernel.validation is not None}
    able = {name: kernel for name, kernel in ours.items() if here.is_one_of(kernel.hardware)}
    if not able:
        raise InputError(
            f"--validate-kernels: none of our kernels runs on {here}; {', '.join(ours)} run on "
            f"{', '.join(sorted({each for kernel in ours.values() for each in kernel.hardware}))}"
        )
    found: list[dict[str, Any]] = []
    for name, kernel in able.items():
        attend = functools.partial(kernel.attend, **kernel.options_on(here))
        outcomes = [outcome(attend, check) for check in checks(kernel.dtypes)]
        agrees = all(each.agrees for each in outcomes)
        rows = [
            {
                "check": each.check.name,
                "head_dim": " to ".join(map(str, dict.fromkeys(each.check.dims))),
                "dtype": each.check.dtype,
                "errors_by_the_references": [round(ratio, 3) for ratio in each.ratios],
                "agrees": each.agrees,
            }
            for each in outcomes
        ]
        file = str(record(name, here, [each.check for each in outcomes])) if agrees else None
        found.append({"kernel": name, "hardware": str(here), "agrees": agrees, "recorded_in": file, "checks": rows})
    if as_json:
        print_json({"validated": found})
    else:
        for row in found:
            print_table(
                f"{row['kernel']} on {row['hardware']}",
                ("check", "head_dim", "dtype", "errors by the reference's: result, dq, dk, dv", "agrees"),
                [tuple(str(value) for value in each.values()) for each in row["checks"]],
            )
            print(f"{row['kernel']}: " + (f"agrees; recorded in {row['recorded_in']}" if row["agrees"] else "differs"))
    if not all(row["agrees"] for row in found):
        raise typer.Exit(1)


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
