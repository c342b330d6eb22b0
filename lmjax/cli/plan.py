"""``lmjax plan``."""

from typing import Annotated, Any

import typer

from lmjax.cli.arguments import AsJson, ConfigFile, Overrides
from lmjax.cli.table import print_json, print_table
from lmjax.errors import InputError

Topology = Annotated[
    str,
    typer.Option(
        "--topology",
        help="What to plan for: a TPU slice by its mesh of chips (v5p:4x4x4), several (2xv5p:8x8x8), the GPUs of a "
        "host (h200:8), several hosts (16xh200:8), or CPU devices (cpu:8).",
        show_default=False,
    ),
]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="Compile the step for the topology, which takes a minute or two, and compare."),
]
Price = Annotated[
    float | None,
    typer.Option("--price", help="What a device costs an hour, in any currency: what the run costs at the bound."),
]


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    topology: Topology = "",
    compiles: Compile = False,
    price: Price = None,
    as_json: AsJson = False,
) -> None:
    """Tell whether a run fits devices that are not here, what fills their memory, and how fast a step can be.

    The estimate takes a second and needs no compiler.

    Example: lmjax plan configs/quickstart.yaml --topology v5e:2x4
    """
    if not topology:
        raise InputError("--topology is missing: name what to plan for, such as v5p:4x4x4, h200:8 or cpu:8")
    if price is not None and price <= 0:
        raise InputError(f"--price is {price}; it has to be above 0")
    import jax

    from lmjax.cli.run_directory import to_job
    from lmjax.config import load
    from lmjax.plan.plan import as_json as to_dict
    from lmjax.plan.plan import make_plan

    jax.config.update("jax_platforms", "cpu")  # nothing is run, and another process may have the accelerators here
    job = to_job(load(config, overrides or ()))
    made = make_plan(job, topology, compiles=compiles)
    if price is not None and made.bound is None:
        raise InputError(f"--price has no effect: how fast {topology} is, is not known. Leave it out.")
    found = to_dict(made)
    if price is not None and made.bound is not None:
        hours = made.bound.seconds / 3600
        found["step_cost_bound"] = cost = price * hours * made.topology.num_devices
        found["run_cost_bound"] = cost * job.train.steps
    print_json(found) if as_json else _print(found)


GIB = 2**30


def _print(found: dict[str, Any]) -> None:
    devices = f"{found['devices']:,} devices of {found['topology']}"
    mesh = " x ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1) or "1 device"
    rows = [(array["kind"], array["name"], _gib(array["bytes"])) for array in found["arrays"]]
    print_table(f"Memory of a device at its peak, the {found['peak']}, in GiB", ("kind", "arrays", "GiB"), rows)
    rows = [(name, _gib(num_bytes)) for name, num_bytes in found["stages"].items()]
    print_table("Stages of a step", ("stage", "GiB"), rows)
    if found["traffic"]:
        rows = [(row["axis"], row["what"], row["link"], _gib(row["bytes"])) for row in found["traffic"]]
        print_table("What a device receives in a step", ("axis", "what", "link", "GiB"), rows)
    if "sent" in found:
        rows = [(row["axes"], row["kind"], row["count"], _gib(row["bytes"])) for row in found["sent"]]
        print_table("What it receives as compiled", ("axes", "collective", "count", "GiB"), rows)
    print(f"{found['parameters']:,} parameters, of which a token goes through {found['active_parameters']:,}")
    print(f"{devices}, mesh {mesh}, {found['tokens_per_step']:,} tokens a step")
    for kind, choice in found["attention_kernels"].items():
        print(f"attention of {kind} blocks: {choice['name']} ({choice['why']})")
    for line in _memory_lines(found) + _speed_lines(found):
        print(line)


def _memory_lines(found: dict[str, Any]) -> list[str]:
    estimate, compiled, memory = found["estimate_bytes"], found.get("compiled_bytes"), found["device_bytes"]
    lines = [f"estimate: {_gib(estimate)} GiB a device"]
    if compiled is not None:
        error = f"the estimate is {100 * (estimate / compiled - 1):+.1f}% off"
        lines.append(f"compiled: {_gib(compiled)} GiB a device in {found['compile_seconds']:.0f} s; {error}")
    if memory is not None:
        by = "as compiled" if compiled is not None else f"with a margin of {100 * found['margin']:.0f}%"
        needed = estimate if compiled is None else compiled
        verdict = "fits" if found["fits"] else "does not fit"
        lines.append(f"{verdict} {by}: {_gib(memory)} GiB a device, of which {_gib(memory - needed)} are left")
    return lines


def _speed_lines(found: dict[str, Any]) -> list[str]:
    if found["step_seconds_bound"] is None:
        return ["speed: not known for CPUs"]
    parts = ", ".join(f"{name} {seconds:.4g} s" for name, seconds in found["bounds"].items())
    rate, mfu = f"{found['tokens_per_second_bound']:,.0f} tokens/s", f"{100 * found['mfu_bound']:.0f}% MFU"
    lines = [
        f"a step takes {found['step_seconds_bound']:.4g} s or more: {parts}, all at the hardware's peak and at once",
        f"{rate} and {mfu} at most",
    ]
    if "run_cost_bound" in found:
        lines.append(f"cost: {found['step_cost_bound']:.4g} a step, {found['run_cost_bound']:,.2f} the run, or more")
    return lines


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.4g}" if num_bytes < GIB / 10 else f"{num_bytes / GIB:,.2f}"
