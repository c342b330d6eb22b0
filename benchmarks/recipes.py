"""The pretraining recipes of configs/pretrain, planned and compiled for the topologies in their heads.

    python benchmarks/recipes.py >> benchmarks/results/recipes.jsonl
    python benchmarks/recipes.py 8b_v5p-128 --heads

A row has what ``lmjax plan --compile`` says: bytes of a device by the estimate and by the compiler, seconds of a step.
``--heads`` compiles nothing and prints what the head of a recipe should say. Needs libtpu, or for GPUs JAX's CUDA
plugin; recipes whose compiler is not installed are told on stderr and left out.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax

from benchmarks.plan_accuracy import versions
from lmjax.cli.run_directory import to_job
from lmjax.config import load
from lmjax.errors import InputError
from lmjax.plan.plan import Plan, make_plan
from lmjax.plan.topology import topology_devices
from lmjax.train.job import Job

RECIPES = sorted((Path(__file__).parent.parent / "configs" / "pretrain").glob("*.yaml"))


def topology(file: Path) -> str:
    """The one that a recipe's head plans for."""
    found = re.search(r"--topology (\S+)", file.read_text())
    assert found is not None, file
    return found[1]


def planned(file: Path, *, compiles: bool = False) -> tuple[Job, Plan]:
    job = to_job(load(str(file), ()))
    return job, make_plan(job, topology(file), compiles=compiles)


def heads(job: Job, plan: Plan) -> tuple[str, str]:
    """The lines of a recipe's head that follow from its plan."""
    assert plan.bound is not None
    assert plan.memory is not None
    gib, predicted = 2**30, plan.bound.predicted
    hours = job.train.steps * predicted / 3600
    memory = f"{plan.peak.bytes / gib:.1f} GiB a device of {plan.memory / gib:.1f}"
    return (
        f"# Planned: {memory}; a step takes {predicted:.3g} s, {plan.bound.seconds:.3g} s at the hardware's peak.",
        f"# Time: {hours:,.0f} hours by that prediction for {job.train.steps:,} steps.",
    )


def row(file: Path) -> dict[str, Any]:
    _, plan = planned(file, compiles=True)
    assert plan.bound is not None
    assert plan.compiled is not None
    assert plan.mfu_bound is not None
    return {
        "name": "recipes",
        "recipe": file.stem,
        "topology": topology(file),
        "estimate_bytes": plan.peak.bytes,
        "compiled_bytes": plan.compiled.total_bytes,
        "device_bytes": plan.memory,
        "error": round(plan.peak.bytes / plan.compiled.total_bytes - 1, 4),
        "fits": plan.fits,
        "step_seconds_predicted": round(plan.bound.predicted, 4),
        "step_seconds_bound": round(plan.bound.seconds, 4),
        "tokens_per_step": plan.setup.tokens,
        "mfu_bound": round(plan.mfu_bound, 3),
        "compile_seconds": round(plan.compiled.seconds, 1),
        "versions": versions(topology(file)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="names without .yaml; all by default")
    parser.add_argument("--heads", action="store_true", help="print what their heads should say, and compile nothing")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    unknown = set(arguments.recipes) - {file.stem for file in RECIPES}
    if unknown:
        parser.error(f"no recipe {', '.join(sorted(unknown))}; there are {', '.join(file.stem for file in RECIPES)}")
    for file in RECIPES:
        if arguments.recipes and file.stem not in arguments.recipes:
            continue
        if arguments.heads:
            print(file.stem, *heads(*planned(file)), sep="\n")
            continue
        try:
            topology_devices(topology(file))
        except InputError as error:
            print(f"{file.stem}: {error}", file=sys.stderr)
            continue
        print(json.dumps(row(file)), flush=True)


if __name__ == "__main__":
    main()
