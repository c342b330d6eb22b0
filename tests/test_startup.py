"""What the environment says about the processes of a run, and that they find each other."""

import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from lmjax.errors import InputError
from lmjax.startup import MULTISLICE, SLURM, VARIABLES, allow_memory, find_processes, start_distributed

ROOT = Path(__file__).parent.parent
PLAIN = dict(zip(VARIABLES, ("host:1234", "2", "1"), strict=True))
STEP = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_NODEID": "1",
}
SLICES = dict(zip(MULTISLICE, ("host", "2", "1"), strict=True))

TASK = """
import jax
from lmjax.startup import start_distributed
start_distributed()
print(jax.process_index(), jax.process_count(), len(jax.devices()))
"""


def refusal(environment: dict[str, str], has_tpu: bool = False) -> str:
    with pytest.raises(InputError) as caught:
        find_processes(environment, has_tpu=has_tpu)
    return str(caught.value)


@pytest.mark.fast
def test_one_process_starts_nothing(monkeypatch: pytest.MonkeyPatch):
    for name in (*VARIABLES, *SLURM):
        monkeypatch.delenv(name, raising=False)
    assert start_distributed() is None
    assert not jax.distributed.is_initialized()
    assert find_processes(STEP | {"SLURM_STEP_NUM_TASKS": "1"}, has_tpu=False) is None
    assert find_processes({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}, has_tpu=False) is None


@pytest.mark.fast
def test_gpus_and_their_host_give_more_memory_than_jax_takes_by_itself():
    environment: dict[str, str] = {}
    allow_memory(environment, 2048 * 2**30)
    assert environment == {"XLA_CLIENT_MEM_FRACTION": "0.9", "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "2048"}
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        said = {name: "0.5", "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "7"}
        allow_memory(asked := dict(said), 2**40)
        assert asked == said
    allow_memory(asked := {"XLA_PJRT_GPU_HOST_MEMORY_PREALLOCATE": "true"}, 2**40)
    assert "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB" not in asked


def test_a_command_says_so_before_jax_looks_for_devices():
    """What JAX's plugin for GPUs is given, in a process that has not looked for any."""
    program = (
        "import jax\nfrom lmjax.startup import start_distributed\nstart_distributed()\n"
        "from jaxlib import xla_client\nprint(xla_client.generate_pjrt_gpu_plugin_options()['memory_fraction'])"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "SLURM"))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) == 0.9


@pytest.mark.fast
def test_plain_variables_are_taken_as_they_are():
    found = find_processes(PLAIN, has_tpu=True)
    assert found is not None
    assert found.description == "process 1 of 2 by the JAX_ variables, coordinator host:1234"
    assert found == find_processes(PLAIN | {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, has_tpu=False)
    assert found == find_processes(PLAIN | STEP, has_tpu=False), "a step that says the same"


@pytest.mark.fast
@pytest.mark.parametrize("name", VARIABLES)
def test_plain_variables_that_are_set_by_half_are_refused(name: str):
    rest = {key: value for key, value in PLAIN.items() if key != name}
    assert f"without {name}: set all of them or none" in refusal(rest)
    assert f"without {name}" in refusal(rest | {name: ""})


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID is '-1'"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2, but JAX_NUM_PROCESSES are 2: numbers go from 0 to 1"),
        ({"JAX_COORDINATOR_ADDRESS": "host"}, "'host'; it has to be host:port"),
        (STEP | {"SLURM_PROCID": "0"}, "say process 1 of 2, the Slurm step 0 of 2. Unset JAX_COORDINATOR_ADDRESS"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "4"}, "the Slurm step 1 of 4"),
    ],
)
def test_plain_variables_that_cannot_be_are_refused(change: dict[str, str], message: str):
    assert message in refusal(PLAIN | change)


@pytest.mark.fast
def test_a_slurm_step_is_joined_with_all_gpus_of_its_host():
    found = find_processes(STEP | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, has_tpu=False)
    assert found is not None
    assert found.description == "process 1 of 2 by the Slurm step, coordinator gpu003:61441"
    assert found.local_devices == ()
    moved = find_processes(STEP | {"JAX_COORDINATOR_PORT": "7000"}, has_tpu=False)
    assert moved is not None
    assert moved.coordinator == "gpu003:7000"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,node[007-009]", "node001"),
        ("node[007-009,12],login", "node007"),
        ("node[3,5]", "node3"),
        ("gpu[003-007,9]-ib,login1", "gpu003-ib"),
        ("r[1-2]n[4-5]", "r1n4"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_the_coordinator_is_on_the_first_host_of_the_step(nodes: str, first: str):
    found = find_processes(STEP | {"SLURM_STEP_NODELIST": nodes}, has_tpu=False)
    assert found is not None
    assert found.coordinator == f"{first}:61441"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (2, 3)),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "4"}, (2, 3)),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "8"}, ()),
        ({"CUDA_VISIBLE_DEVICES": "0"}, ()),
        ({"CUDA_VISIBLE_DEVICES": ""}, ()),
        ({}, (1,)),
    ],
)
def test_tasks_of_one_host_share_its_gpus(environment: dict[str, str], devices: tuple[int, ...]):
    two = {"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    found = find_processes(STEP | two | environment, has_tpu=False)
    assert found is not None
    assert found.local_devices == devices


@pytest.mark.fast
def test_gpus_that_the_tasks_of_a_host_do_not_divide_are_refused():
    three = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "1,3", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    assert "3 tasks on this host see the same 4 GPUs: 4 mod 3 = 1" in refusal(STEP | three)


@pytest.mark.fast
def test_a_slurm_job_outside_of_srun_and_a_torn_step_are_refused():
    assert "not started by srun" in refusal({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"})
    for name in set(SLURM) - {"SLURM_STEP_NUM_TASKS"}:
        assert f"without {name}" in refusal({key: value for key, value in STEP.items() if key != name})
    assert "SLURM_PROCID is 2" in refusal(STEP | {"SLURM_PROCID": "2"})
    assert "on a machine with TPUs" in refusal(STEP, has_tpu=True)


@pytest.mark.fast
def test_a_tpu_pod_needs_no_address():
    found = find_processes({}, has_tpu=True)
    assert found is not None
    assert (found.coordinator, found.count, found.description) == (None, None, "processes by the TPU pod")
    several = find_processes(SLICES | {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, has_tpu=True)
    assert several is not None
    assert several.description == "processes by slice 1 of 2 TPU slices"
    assert find_processes(SLICES, has_tpu=False) is None


@pytest.mark.fast
def test_a_tpu_pod_that_is_described_by_half_is_refused():
    for name in MULTISLICE:
        rest = {key: value for key, value in SLICES.items() if key != name}
        assert f"without {name}" in refusal(rest, has_tpu=True)
    assert "MEGASCALE_SLICE_ID is 2" in refusal(SLICES | {"MEGASCALE_SLICE_ID": "2"}, has_tpu=True)
    assert "TPU_WORKER_ID is ''" in refusal({"TPU_WORKER_HOSTNAMES": "a,b"}, has_tpu=True)
    assert "TPU_WORKER_ID is 2" in refusal({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "2"}, has_tpu=True)


@pytest.mark.fast
def test_a_pod_that_jax_does_not_find_is_refused(monkeypatch: pytest.MonkeyPatch):
    for name in (*VARIABLES, *SLURM, *MULTISLICE, "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    asked = []

    def initialize(*arguments, **options):
        asked.append((arguments, options))
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax, "config", types.SimpleNamespace(jax_platforms="tpu,cpu"))
    with pytest.raises(InputError, match="JAX found no TPU pod .*Set JAX_COORDINATOR_ADDRESS"):
        start_distributed()
    ((arguments, options),) = asked
    assert arguments == (None, None, None)
    assert (options["cluster_detection_method"], options["local_device_ids"]) == (None, None)


def test_two_slurm_tasks_join():
    with socket.socket() as held:  # nobody else gets the port; the coordinator shares it, as gRPC does
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("", 0))
        common = (
            os.environ
            | STEP
            | {
                "SLURM_STEP_NODELIST": "127.0.0.1",
                "JAX_COORDINATOR_PORT": str(held.getsockname()[1]),
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "2",
                "PYTHONPATH": str(ROOT),
            }
        )
        tasks = [
            subprocess.Popen(
                [sys.executable, "-c", TASK],
                env=common | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]
        for number, task in enumerate(tasks):
            out, err = task.communicate(timeout=120)
            assert task.returncode == 0, err
            assert out.split() == [str(number), "2", "4"]
            assert f"lmjax: process {number} of 2 by the Slurm step, coordinator 127.0.0.1:" in err
