"""How long the planner's search takes: every mesh, remat policy and number of micro-batches of recipes on large slices.

    python benchmarks/plan_search.py

The last line is one JSON object: the candidates that were estimated, and the seconds that took in all and for each.
"""

import json
import platform
import time
from pathlib import Path

import jax

from lmjax.cli.run_directory import to_job
from lmjax.config import load
from lmjax.plan.search import search
from lmjax.plan.topology import parse_topology

CONFIGS = Path(__file__).parent.parent / "configs" / "pretrain"
CASES = (
    ("mixtral_v6e-256", ("v5e:16x16", "v6e:16x16", "2xv6e:16x16", "32xh200:8")),
    ("8b_v5e-256", ("v5e:16x16", "v6e:16x16", "v5p:8x8x8")),
)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    candidates, seconds = 0, 0.0
    for recipe, topologies in CASES:
        job = to_job(load(str(CONFIGS / f"{recipe}.yaml"), ()))
        for topology in topologies:
            began = time.perf_counter()
            found = search(job, parse_topology(topology))
            took = time.perf_counter() - began
            print(f"{recipe} on {topology}: {found.tried:,} candidates, {len(found.fitting):,} fit, {took:.1f} s")
            candidates, seconds = candidates + found.tried, seconds + took
    each = round(1000 * seconds / candidates, 2)
    found = {"name": "plan_search", "candidates": candidates, "seconds": round(seconds, 1), "milliseconds_each": each}
    print(json.dumps({**found, "python": platform.python_version(), "jax": jax.__version__}))


if __name__ == "__main__":
    main()
