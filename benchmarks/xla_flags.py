"""What XLA's compilers make of flags that recipes of this field set: whether they know them, and what they change.

    python benchmarks/xla_flags.py --topology v6e:2x4 >> benchmarks/results/xla_flags.jsonl

A step of a model of 0.9 billion parameters is compiled without any and with each set; a row says whether the compiled
program is another one, and the bytes of a device. Of speed it says nothing: that wants the hardware. Flags that change
nothing, because the compiler does so by itself or has no use for them, are not in ``lmjax.xla_flags``. Needs libtpu, or
for GPUs JAX's CUDA plugin.
"""

import argparse
import dataclasses
import hashlib
import json
import re
from typing import Any

import jax

from benchmarks.plan_accuracy import Case, versions
from lmjax.compat import temporary_bytes
from lmjax.errors import InputError
from lmjax.hardware import hardware
from lmjax.mesh import MeshConfig
from lmjax.plan.compile import topology_mesh
from lmjax.plan.topology import parse_topology, topology_devices
from lmjax.train.job import Job, lower_program, make_program
from lmjax.xla_flags import Value

MAXTEXT = "MaxText 0.2.4, benchmarks/xla_flags_library.py"
RECIPES = "gpu-recipes (2026-08), A3 Ultra, Llama-3.1-70B"
SETS: dict[str, dict[str, tuple[str, dict[str, Value]]]] = {
    "tpu": {
        "gathers fused with computing": (
            MAXTEXT,
            {
                "xla_tpu_enable_async_collective_fusion": True,
                "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
                "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
                "xla_tpu_overlap_compute_collective_tc": True,
                "xla_enable_async_all_gather": True,
            },
        ),
        "sums fused with computing": (
            MAXTEXT,
            {
                "xla_tpu_enable_async_collective_fusion": True,
                "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
                "xla_enable_async_all_reduce": True,
            },
        ),
        "more vector memory": (MAXTEXT, {"xla_tpu_scoped_vmem_limit_kib": 98304}),
        "layouts for reduce-scatter": (
            MAXTEXT,
            {
                "xla_tpu_use_minor_sharding_for_major_trivial_input": True,
                "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": 1,
                "xla_tpu_assign_all_reduce_scatter_layout": True,
            },
        ),
        "sums over dcn hidden": (
            MAXTEXT,
            {
                "xla_tpu_enable_data_parallel_all_reduce_opt": True,
                "xla_tpu_data_parallel_opt_different_sized_ops": True,
            },
        ),
        "gathers of the backward pass ahead": (MAXTEXT, {"xla_tpu_enable_ag_backward_pipelining": True}),
        "permutes beside computing": (MAXTEXT, {"xla_enable_async_collective_permute": True}),
    },
    "gpu": {
        "latency-hiding scheduler": (RECIPES, {"xla_gpu_enable_latency_hiding_scheduler": True}),
        "gathers combined": ("JAX-Toolbox (2026-07)", {"xla_gpu_all_gather_combine_threshold_bytes": 2**30}),
        "scattered sums combined": (
            "JAX-Toolbox (2026-07)",
            {"xla_gpu_reduce_scatter_combine_threshold_bytes": 2**27},
        ),
        "sums combined": ("JAX-Toolbox (2026-07)", {"xla_gpu_all_reduce_combine_threshold_bytes": 2**30}),
        "two turns of a loop at once": (RECIPES, {"xla_gpu_enable_while_loop_double_buffering": True}),
        "pipelined gathers": (RECIPES, {"xla_gpu_enable_pipelined_all_gather": True}),
        "pipelined scattered sums": (RECIPES, {"xla_gpu_enable_pipelined_reduce_scatter": True}),
        "no products by Triton": (RECIPES, {"xla_gpu_enable_triton_gemm": False}),
        "no rematerialisation by XLA": (RECIPES, {"xla_disable_hlo_passes": "rematerialization"}),
        "asynchronous gathers": ("MaxText 0.2.4, a3 scripts", {"xla_gpu_enable_async_all_gather": True}),
    },
}
"""By platform and name: who sets them, and what."""


def job(topology: str) -> Job:
    found = parse_topology(topology)
    data = found.slices
    case = Case(model="grouped", topology=topology, data=data, fsdp=8 // data, rows=16, length=4096, policy="full")
    mesh = MeshConfig(data=data, fsdp=found.num_devices // data, dcn_data=data)
    return dataclasses.replace(case.job, mesh=mesh)


def program(text: str) -> str:
    """A digest of a compiled program without names and places in the source."""
    text = re.sub(r"metadata=\{[^}]*\}", "", text)
    return hashlib.sha256(re.sub(r"%[\w.\-]+", "%", text).encode()).hexdigest()[:16]


def rows(topology: str) -> Any:
    topology_devices(topology)
    jax.config.update("jax_platforms", "cpu")
    run = job(topology)
    made = make_program(run, topology_mesh(run.mesh, topology))
    lowered = lower_program(run, made)
    plain = None
    sets = {"none": ("", {}), **SETS[made.execution.hardware.platform]}
    for name, (source, flags) in sets.items():
        row = {"name": "xla_flags", "topology": topology, "set": name, "source": source, "flags": flags}
        row["hardware"] = str(hardware(made.mesh.devices.flat[0]))
        options: dict[str, Any] = dict(flags)
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            yield {**row, "refused": " ".join(str(error).split())[:200]}
            continue
        memory: Any = compiled.memory_analysis()
        lasting = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        digest = program(compiled.as_text() or "")
        plain = plain or digest
        yield {**row, "changes_program": digest != plain, "bytes": lasting + temporary_bytes(compiled)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x4")
    arguments = parser.parse_args()
    if parse_topology(arguments.topology).hardware.platform == "cpu":
        raise InputError("there are no flags for CPUs; name TPUs or GPUs")
    for row in rows(arguments.topology):
        print(json.dumps({**row, "versions": versions(arguments.topology)}), flush=True)


if __name__ == "__main__":
    main()
