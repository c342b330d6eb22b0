"""``lmjax plan``."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from lmjax.cli.arguments import AsJson, ConfigFile, Overrides
from lmjax.cli.table import print_json, print_table
from lmjax.errors import InputError
from lmjax.plan.words import gib, mesh_text, moments_text, remat_text

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
    typer.Option(
        "--price",
        help="What a device costs an hour, in any currency (a chip of TPU7x is two): what the run costs at the bound.",
    ),
]
Search = Annotated[
    bool,
    typer.Option(
        "--search",
        help="Go through every mesh, remat policy and number of micro-batches, and rank those that fit by their "
        "predicted time; with --compile the best are compiled until one fits. The plan is that of the first.",
    ),
]
Write = Annotated[
    str | None,
    typer.Option("--write", metavar="FILE", help="With --search: a config with the first of the ranking, to train by."),
]
Arrays = Annotated[
    bool,
    typer.Option("--arrays", help="With --compile: list what is in a device's memory at the compiled step's peak."),
]
Executable = Annotated[
    str | None,
    typer.Option(
        "--executable",
        metavar="FILE",
        help="With --compile: a file with the compiled step, which `lmjax train --executable FILE` loads.",
    ),
]
Report = Annotated[
    str | None, typer.Option("--report", metavar="FILE", help="A page with the memory and the mesh as pictures.")
]


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    topology: Topology = "",
    compiles: Compile = False,
    searches: Search = False,
    write: Write = None,
    executable: Executable = None,
    arrays: Arrays = False,
    report: Report = None,
    price: Price = None,
    as_json: AsJson = False,
) -> None:
    """Tell whether a run fits devices that are not here, what fills their memory, and how fast a step can be.

    The estimate takes a second and needs no compiler.

    Example: lmjax plan configs/quickstart.yaml --topology v5e:2x4
    """
    if not topology:
        raise InputError("--topology is missing: name what to plan for, such as v5p:4x4x4, h200:8 or cpu:8")
    if write is not None and not searches:
        raise InputError("--write is for what --search finds; give both, or neither")
    if executable is not None and not compiles:
        raise InputError("--executable is for what --compile makes; give both, or neither")
    if arrays and not compiles:
        raise InputError("--arrays are those that --compile finds; give both, or neither")
    if executable is not None and searches:
        raise InputError("--executable is of one plan: --search first, with --write FILE, and then plan FILE --compile")
    if price is not None and not (math.isfinite(price) and price > 0):
        raise InputError(f"--price is {price}; it has to be a number above 0")
    _check_outputs({"--write": write, "--executable": executable, "--report": report})
    import jax

    from lmjax.cli.run_directory import to_job
    from lmjax.config import load
    from lmjax.plan.plan import as_json as to_dict
    from lmjax.plan.plan import make_plan
    from lmjax.plan.search import chosen

    jax.config.update("jax_platforms", "cpu")  # nothing is run, and another process may have the accelerators here
    loaded = load(config, overrides or ())
    job = to_job(loaded)
    found_by_search = None
    if searches:
        found_by_search, made = chosen(job, topology, compiles=compiles, lists_arrays=arrays)
    else:
        made = make_plan(job, topology, compiles=compiles, executable=executable, lists_arrays=arrays)
    if price is not None and made.bound is None:
        raise InputError(f"--price has no effect: how fast {topology} is, is not known. Leave it out.")
    found = to_dict(made)
    if executable is not None:
        found["executable"] = _executable(executable, made.topology.hardware.platform)
    if found_by_search is not None:
        ranking = found_by_search.fitting
        found["search"] = {
            "tried": found_by_search.tried,
            "fitting": len(ranking),
            "ranking": [_candidate(candidate) for candidate in ranking[:RANKED]],
        }
        if write is not None:
            best = ranking[0].job
            _write(write, dataclasses.replace(loaded, mesh=best.mesh, train=best.train), config, topology)
            found["search"]["written"] = write
    if price is not None and made.bound is not None:
        hours = made.bound.seconds / 3600
        found["step_cost_bound"] = cost = price * hours * made.topology.num_devices
        found["run_cost_bound"] = cost * job.train.steps
    print_json(found) if as_json else _print(found)
    if report is not None:
        from lmjax.plan.picture import write_plan  # Matplotlib is not worth waiting for otherwise

        write_plan(found, report)


RANKED = 10
"""Candidates of a search that are shown."""


def _candidate(candidate: Any) -> dict[str, Any]:
    return {
        **candidate.overrides,
        "estimate_bytes": candidate.estimate_bytes,
        "step_seconds_predicted": candidate.bound.predicted,
        "step_seconds_bound": candidate.bound.seconds,
    }


def _executable(file: str, platform: str) -> dict[str, Any]:
    from lmjax.train.executable import COMPILERS
    from lmjax.train.provenance import installed

    # Autotuning times kernels on the device, which is not here.
    return {"file": file, "versions": installed(COMPILERS[platform]), "autotuned": platform != "gpu"}


def _check_outputs(files: dict[str, str | None]) -> None:
    """Before any work. Raises InputError for a file that could not be written, and for one that may be somebody's."""
    from lmjax.paths import as_path, is_remote, reaching

    named: dict[str, str] = {}
    for option, file in files.items():
        if file is None:
            continue
        path = as_path(file)
        with reaching(path):
            if path.is_dir():
                raise InputError(f"{option} {file}: is a directory; name a file in it")
            if path.exists() and not (option == "--report" and PAGE in path.read_bytes()[:1000]):
                raise InputError(f"{option} {file}: is there already, and may be somebody's; name another file")
            if not is_remote(path) and not path.parent.is_dir():
                raise InputError(f"{option} {file}: no directory {path.parent} is there; make it first")
        if str(path) in named:
            raise InputError(f"{option} and {named[str(path)]} name the same file, {file}; name two")
        named[str(path)] = option


PAGE = b"<title>Plan for "
"""Near the beginning of a page, that another one may take the place of."""


def _write(file: str, found: Any, config: str, topology: str) -> None:
    """The whole config that the plan is of. It has no base, whose values would come back where the search has none."""
    from lmjax.config import to_yaml
    from lmjax.paths import as_path, is_remote, write_object

    text = f"# {Path(config).name} on {topology}, by lmjax plan --search.\n{to_yaml(found)}"
    if is_remote(file):
        write_object(as_path(file), text.encode())
        return
    with open(file, "x", encoding="utf-8") as out:
        out.write(text)


def _print(found: dict[str, Any]) -> None:
    if "search" in found:
        _print_ranking(found["search"])
    devices = f"{found['devices']:,} devices of {found['topology']}"
    rows = [(array["kind"], array["name"], gib(array["bytes"])) for array in found["arrays"]]
    print_table(f"Memory of a device at its peak, the {found['peak']}, in GiB", ("kind", "arrays", "GiB"), rows)
    rows = [(stage["name"], gib(stage["bytes"])) for stage in found["stages"]]
    print_table("Stages of a step", ("stage", "GiB"), rows)
    if found["traffic"]:
        rows = [(row["axis"], row["what"], row["link"], gib(row["bytes"])) for row in found["traffic"]]
        print_table("What a device receives in a step", ("axis", "what", "link", "GiB"), rows)
    if "sent" in found:
        rows = [(row["axes"], row["kind"], row["count"], gib(row["bytes"])) for row in found["sent"]]
        print_table("What it receives as compiled", ("axes", "collective", "count", "GiB"), rows)
    if "compiled_arrays" in found:
        _print_arrays(found["compiled_arrays"])
    for line in _compiler_lines(found):
        print(line)
    print(f"{found['parameters']:,} parameters, of which a token goes through {found['active_parameters']:,}")
    print(f"{devices}, mesh {mesh_text(found['mesh'])}, {found['tokens_per_step']:,} tokens a step")
    for kind, choice in found["attention_kernels"].items():
        print(f"attention of {kind} blocks: {choice['name']} ({choice['why']})")
    for line in _memory_lines(found) + _speed_lines(found):
        print(line)


LISTED = 20
"""Kinds of arrays of a compiled step that are shown one by one."""


def _print_arrays(arrays: list[dict[str, Any]]) -> None:
    sizes: dict[tuple[str, str], list[int]] = {}
    for row in arrays:
        sizes.setdefault((row["type"], row["scope"] or row["name"]), []).append(row["bytes"])
    largest = sorted(sizes.items(), key=lambda item: -sum(item[1]))
    rows = [(gib(sum(each)), len(each), type_ or None, made_in) for (type_, made_in), each in largest[:LISTED]]
    if rest := [size for _, each in largest[LISTED:] for size in each]:
        rows.append((gib(sum(rest)), len(rest), None, "all others"))
    print_table("Memory of a device at its peak as compiled", ("GiB", "arrays", "type", "made in"), rows)


def _print_ranking(search: dict[str, Any]) -> None:
    rows = []
    for row in search["ranking"]:
        seconds, train = f"{row['step_seconds_predicted']:.4g}", row["train"]
        mesh, memory = mesh_text(row["mesh"]), gib(row["estimate_bytes"])
        rows.append((seconds, mesh, remat_text(train["remat"]), train["accumulation"], moments_text(train), memory))
    title = f"The best of {search['fitting']:,} that fit, of {search['tried']:,}"
    print_table(title, ("predicted seconds", "mesh", "remat", "micro-batches", "moments on", "GiB"), rows)


def _compiler_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    if found.get("xla_flags"):
        lines.append(f"compiler flags: {' '.join(f'{name}={value}' for name, value in found['xla_flags'].items())}")
    if found.get("unknown_xla_flags"):
        lines.append(f"not known to this version's compiler: {', '.join(found['unknown_xla_flags'])}")
    if found.get("kernel_memory"):
        sizes = ", ".join(f"{name} {num_bytes / 2**20:.1f}" for name, num_bytes in found["kernel_memory"].items())
        lines.append(f"vector memory of kernels, in MiB: {sizes}")
    if file := found.get("executable"):
        versions = ", ".join(f"{name} {version}" for name, version in file["versions"].items())
        lines.append(f"{file['file']}: for {versions}")
        if not file["autotuned"]:
            lines.append(
                "its kernels are not tuned, which takes the GPU itself: for a long run, let lmjax train compile"
            )
    return lines


def _memory_lines(found: dict[str, Any]) -> list[str]:
    estimate, compiled, memory = found["estimate_bytes"], found.get("compiled_bytes"), found["device_bytes"]
    lines = [f"estimate: {gib(estimate)} GiB a device, with the compilers of {found['estimate_of']}"]
    if compiled is not None:
        error = f"the estimate is {100 * (estimate / compiled - 1):+.1f}% off"
        when = "before, in" if found["compiled_before"] else "in"
        lines.append(f"compiled: {gib(compiled)} GiB a device, {when} {found['compile_seconds']:.0f} s; {error}")
    if found["host_bytes"]:
        lines.append(f"on the hosts: {gib(found['host_bytes'])} GiB for each device")
    if memory is not None and found["fits"] is None:
        lines.append(f"whether it fits is for --compile to say: not in the estimate is {found['unaccounted']}")
    elif memory is not None:
        by = "as compiled" if compiled is not None else f"with a margin of {100 * found['margin']:.0f}%"
        needed = estimate if compiled is None else compiled
        verdict = "fits" if found["fits"] else "does not fit"
        lines.append(f"{verdict} {by}: {gib(memory)} GiB a device, of which {gib(memory - needed)} are left")
    return lines


def _speed_lines(found: dict[str, Any]) -> list[str]:
    if found["step_seconds_bound"] is None:
        return ["speed: not known for CPUs"]
    bounds = dict(found["bounds"])
    waited_for, host = bounds.pop("waited_for"), bounds.pop("host")
    if host:
        bounds["host's memory"] = host
    parts = ", ".join(f"{name} {seconds:.4g} s" for name, seconds in bounds.items())
    rate, mfu = f"{found['tokens_per_second_bound']:,.0f} tokens/s", f"{100 * found['mfu_bound']:.0f}% MFU"
    lines = [
        f"a step at the hardware's peak, everything at once: {found['step_seconds_bound']:.4g} s ({parts})",
        f"at that peak {rate} and {mfu}",
        f"predicted: {found['step_seconds_predicted']:.4g} s, computing waits {waited_for:.4g} s for other devices",
    ]
    if "run_cost_bound" in found:
        chip = found["chip_devices"]
        per_chip = f" (the price is of a device, of which a chip has {chip})" if chip > 1 else ""
        cost = f"{found['step_cost_bound']:.4g} a step, {found['run_cost_bound']:,.2f} the run"
        lines.append(f"cost at that peak: {cost}{per_chip}")
    return lines
