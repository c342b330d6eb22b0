"""Which processes a run has, as the environment tells it, and how they join.

In order: the variables that ``launch/local.sh`` sets, the tasks of a Slurm step, the hosts of a TPU pod. What is set by
half, or says two things, is refused.
"""

import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

import jax

from lmjax.errors import InputError
from lmjax.hardware import GPU_MEMORY_FRACTION

SHUTDOWN_SECONDS = 60
"""How long a process that ends waits for the others: one that failed alone must not hold up its launcher for long."""

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST")
MULTISLICE = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")

FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""The newer name and the older one; JAX refuses both at once."""
HOST_LIMIT, HOST_PREALLOCATE = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "XLA_PJRT_GPU_HOST_MEMORY_PREALLOCATE"


class Processes(NamedTuple):
    """The processes of a run. Address and numbers are None where JAX asks the machine for them."""

    source: str
    """Who started them, in words."""
    coordinator: str | None = None
    """host:port of process 0."""
    count: int | None = None
    number: int | None = None
    """Which of them this is, from 0."""
    local_devices: tuple[int, ...] = ()
    """The GPUs of this host that are this process's; none named: all that it sees."""

    @property
    def description(self) -> str:
        """One line for whoever waits for the processes to find each other."""
        which = "processes" if self.count is None else f"process {self.number} of {self.count}"
        where = "" if self.coordinator is None else f", coordinator {self.coordinator}"
        gpus = f", GPU {' and '.join(map(str, self.local_devices))} of its host" if self.local_devices else ""
        return f"{which} by {self.source}{where}{gpus}"


def allow_memory(environment: MutableMapping[str, str], host_bytes: int) -> None:
    """Say how much JAX may take of GPUs and, for what is sent to or kept on the host, of its memory; what is set stays.

    JAX's own limits are three quarters of a GPU and 64 GiB, whatever the host has. It reads them when it first looks
    for devices.
    """
    if not any(name in environment for name in FRACTIONS):
        environment[FRACTIONS[0]] = str(GPU_MEMORY_FRACTION)
    # It is a limit, of which nothing is taken before it is needed; with HOST_PREALLOCATE all of it would be.
    if HOST_PREALLOCATE not in environment:
        environment.setdefault(HOST_LIMIT, str(host_bytes // 2**30))


def start_distributed() -> Processes | None:
    """Join the other processes of this run and say so on stderr; None for a run of one process.

    Sets the limits of ``allow_memory``. Raises InputError for an environment that is set by half or contradicts itself.
    """
    allow_memory(os.environ, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if jax.distributed.is_initialized():
        return None
    # On a machine that has TPUs, JAX itself sets it to tpu,cpu when it is imported.
    platforms = jax.config.jax_platforms or ""  # pyright: ignore[reportAttributeAccessIssue]
    found = find_processes(os.environ, has_tpu="tpu" in platforms.split(","))
    if found is None:
        return None
    print(f"lmjax: {found.description}", file=sys.stderr, flush=True)
    if platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            found.coordinator,
            found.count,
            found.number,
            local_device_ids=list(found.local_devices) or None,
            cluster_detection_method=None if found.coordinator is None else "deactivate",
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        raise InputError(
            f"the processes of this run cannot be told: JAX found no TPU pod ({error}). Set {', '.join(VARIABLES)}; "
            "for one process these are localhost:12345, 1 and 0"
        ) from error
    return found


def find_processes(environment: Mapping[str, str], *, has_tpu: bool) -> Processes | None:
    """What ``environment`` says about the processes of this run; None for a run of one process."""
    slurm = _slurm(environment)
    if any(name in environment for name in VARIABLES):
        found = _variables(environment)
        if slurm is not None and (slurm.count, slurm.number) != (found.count, found.number):
            raise InputError(
                f"{VARIABLES[1]} and {VARIABLES[2]} say process {found.number} of {found.count}, the Slurm step "
                f"{slurm.number} of {slurm.count}. Unset {', '.join(VARIABLES)} to go by Slurm."
            )
        return found
    if slurm is not None and has_tpu:
        raise InputError(
            f"a Slurm step of {slurm.count} tasks on a machine with TPUs: tasks and TPU workers may be numbered "
            f"differently. Set {', '.join(VARIABLES)}, with the TPU workers' numbers, or unset SLURM_STEP_NUM_TASKS."
        )
    return _tpu(environment) if slurm is None and has_tpu else slurm


def _variables(environment: Mapping[str, str]) -> Processes:
    values = _all_or_none(environment, VARIABLES, "launch/local.sh sets all three")
    address, count, number = values[0], *(_number(environment, name) for name in VARIABLES[1:])
    if not re.fullmatch(r".+:\d+", address):
        raise InputError(f"{VARIABLES[0]} is {address!r}; it has to be host:port of process 0, as node001:12345")
    _check_below(VARIABLES[2], number, VARIABLES[1], count)
    return Processes("the JAX_ variables", address, count, number)


def _slurm(environment: Mapping[str, str]) -> Processes | None:
    """The tasks of a Slurm step.

    JAX's own detection takes them from the same variables, but gives a task that has a whole host to itself one of its
    GPUs, and takes tasks of a batch script that no srun has started for real ones.
    """
    if "SLURM_STEP_NUM_TASKS" not in environment:
        tasks = environment.get("SLURM_NTASKS", "1")
        if "SLURM_JOB_ID" in environment and tasks != "1" and VARIABLES[0] not in environment:
            raise InputError(
                f"inside a Slurm job of {tasks} tasks, but not started by srun, so that the other tasks are not there. "
                "Start it as `srun lmjax ...` (launch/slurm_gpu.sh does), or with `srun --ntasks=1` for one process."
            )
        return None
    count = _number(environment, "SLURM_STEP_NUM_TASKS")
    if count == 1:
        return None
    job, *_, nodes = _all_or_none(environment, SLURM, "srun sets them for every task")
    number, local = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_LOCALID")
    _check_below("SLURM_PROCID", number, "SLURM_STEP_NUM_TASKS", count)
    # JAX's rule: above the range from which Linux takes ports for outgoing connections.
    port = 61440 + int(re.sub(r"\D", "", job) or 0) % 4096
    if "JAX_COORDINATOR_PORT" in environment:
        port = _number(environment, "JAX_COORDINATOR_PORT")
    return Processes(
        "the Slurm step", f"{_first_node(nodes)}:{port}", count, number, _share_of_gpus(environment, local, number)
    )


def _first_node(nodes: str) -> str:
    """The first of a list such as gpu[003-007,9]-ib,login1: gpu003-ib."""
    entry = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert entry is not None
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", entry[0])


def _share_of_gpus(environment: Mapping[str, str], local: int, number: int) -> tuple[int, ...]:
    """What task ``local`` of its host takes of the GPUs that it sees; nothing where all of them are its own."""
    tasks = _tasks_on_node(environment, number)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if tasks == 1 or visible == "":
        return ()
    if visible is None:
        return (local,)
    seen = len(visible.split(","))
    told = "SLURM_GPUS_ON_NODE" in environment
    if seen * tasks <= (_number(environment, "SLURM_GPUS_ON_NODE") if told else tasks):
        return ()  # Slurm has dealt them out, as with --gpus-per-task
    if seen % tasks:
        raise InputError(
            f"{tasks} tasks on this host see the same {seen} GPUs: {seen} mod {tasks} = {seen % tasks}. Start one task "
            "a host (--ntasks-per-node=1), or deal them out with --gpus-per-task."
        )
    share = seen // tasks
    return tuple(range(local * share, (local + 1) * share))


def _tasks_on_node(environment: Mapping[str, str], number: int) -> int:
    """How many tasks the host of task ``number`` has, by a list such as 4(x2),3."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "1"))
    counts = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(times or 1)
    node = environment.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else max(counts)


def _tpu(environment: Mapping[str, str]) -> Processes:
    """The hosts of a TPU pod, of one slice or several; JAX asks the variables of GKE or the metadata server of GCE."""
    if any(name in environment for name in MULTISLICE):
        _all_or_none(environment, MULTISLICE, "whoever starts several slices sets all three")
        count, number = _number(environment, MULTISLICE[1]), _number(environment, MULTISLICE[2])
        _check_below(MULTISLICE[2], number, MULTISLICE[1], count)
        source = f"slice {number} of {count} TPU slices"
    else:
        source = "the TPU pod"
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        _check_below("TPU_WORKER_ID", _number(environment, "TPU_WORKER_ID"), "the hosts", len(hosts.split(",")))
    return Processes(source)


def _all_or_none(environment: Mapping[str, str], names: tuple[str, ...], who: str) -> list[str]:
    missing = [name for name in names if not environment.get(name)]
    if missing:
        there = ", ".join(f"{name}={environment[name]}" for name in names if environment.get(name))
        raise InputError(f"{there or names[0]} without {', '.join(missing)}: set all of them or none; {who}.")
    return [environment[name] for name in names]


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdecimal():
        raise InputError(f"{name} is {value!r}; it has to be a whole number, counted from 0 where it tells one of many")
    return int(value)


def _check_below(name: str, number: int, of: str, count: int) -> None:
    if number >= count:
        raise InputError(f"{name} is {number}, but {of} are {count}: numbers go from 0 to {count - 1}")
