"""What launch/local.sh promises about environments, output, signals and exit codes; the commands are plain shell."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.stubs import Cluster

pytestmark = pytest.mark.fast

LAUNCH = Path(__file__).parents[2] / "launch" / "local.sh"
WAIT_FOR_TERM = "trap 'exit 75' TERM; echo ready; while :; do sleep 0.05; done"


def launch(number: str, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([LAUNCH, number, "bash", "-c", script], capture_output=True, text=True, check=False)


def test_each_process_has_a_number_a_coordinator_and_a_prefix():
    done = launch("3", "echo $JAX_PROCESS_ID of $JAX_NUM_PROCESSES at ${JAX_COORDINATOR_ADDRESS%:*}; echo told >&2")
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [f"[{number}] {number} of 3 at 127.0.0.1" for number in range(3)]
    assert sorted(done.stderr.splitlines()) == [f"[{number}] told" for number in range(3)]


def test_all_have_the_same_port():
    done = launch("2", "echo $JAX_COORDINATOR_ADDRESS")
    assert len({line.split()[1] for line in done.stdout.splitlines()}) == 1


def test_one_that_fails_ends_the_others_and_its_code_is_returned():
    done = launch("2", f"if ((JAX_PROCESS_ID)); then exit 3; fi; {WAIT_FOR_TERM}")
    assert done.returncode == 3
    assert "process 1 ended with exit code 3" in done.stderr


def test_one_that_is_killed_ends_the_others():
    done = launch("2", f"if ((JAX_PROCESS_ID)); then kill -KILL $$; fi; {WAIT_FOR_TERM}")
    assert done.returncode == 128 + signal.SIGKILL


def test_one_that_is_killed_before_the_script_waits_is_not_missed(tmp_path):
    late = tmp_path / "local.sh"
    # Here bash hears of the death, and tells it, before the loop begins: `wait -n` knows of it no more.
    late.write_text(LAUNCH.read_text().replace("\nfailed=0", "\nsleep 0.5; jobs >&2; failed=0"))
    assert "jobs >&2" in late.read_text()
    script = "if ((JAX_PROCESS_ID)); then kill -KILL $$; fi; sleep 3; exit 4"
    command = ["bash", late, "2", "bash", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGKILL
    assert "process 1 ended with exit code 137" in done.stderr


def test_a_stop_with_a_saved_state_ends_nobody():
    done = launch("2", 'if ((JAX_PROCESS_ID)); then exit 75; fi; read -t 0.2 < <(sleep 1); echo "went on"')
    assert done.returncode == 75
    assert "[0] went on" in done.stdout


def test_a_signal_reaches_every_process():
    command = [LAUNCH, "2", "bash", "-c", WAIT_FOR_TERM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert sorted(running.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
        running.send_signal(signal.SIGTERM)
        assert running.wait() == 75


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_signals_that_would_end_a_run_unsaved_reach_it_as_term(name: str):
    with subprocess.Popen([LAUNCH, "2", "bash", "-c", WAIT_FOR_TERM], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert sorted(running.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
        running.send_signal(signal.Signals[name])
        assert running.wait() == 75


def test_a_run_saves_when_its_terminal_closes_and_nobody_reads_what_it_says(tmp_path: Path):
    """A second hangup, as a terminal sends it, does not end it."""
    script = f"""
trap 'trap - TERM; for i in 1 2 3 4 5; do sleep 0.2; echo saving; done; touch {tmp_path}/$JAX_PROCESS_ID; exit 75' TERM
echo ready; while :; do sleep 0.05; done"""
    command = [LAUNCH, "2", "bash", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None
        assert sorted(running.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
        running.stdout.close()
        running.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        running.send_signal(signal.SIGHUP)
        assert running.wait(timeout=60) == 75
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


GPUS = ("nvidia-smi", "echo 0; echo 1; echo 2; echo 3")


@pytest.mark.parametrize(
    ("variables", "seen"),
    [
        ({}, ["0,1", "2,3"]),
        ({"CUDA_VISIBLE_DEVICES": "4,5"}, ["4", "5"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, ["", ""]),
        ({"JAX_PLATFORMS": "cpu"}, ["none", "none"]),
    ],
    ids=str,
)
def test_gpus_are_dealt_out(tmp_path: Path, variables: dict[str, str], seen: list[str]):
    cluster = Cluster(tmp_path)
    cluster.add(*GPUS)
    variables = {"JAX_PLATFORMS": ""} | variables
    script = "echo $JAX_PROCESS_ID=${CUDA_VISIBLE_DEVICES-none}"
    done = cluster.run("local.sh", "2", "bash", "-c", script, **variables)
    assert sorted(done.stdout.splitlines()) == [f"[{number}] {number}={gpus}" for number, gpus in enumerate(seen)]
    dry = cluster.run("local.sh", "2", "true", **variables, DRY_RUN="1")
    told = [re.findall(r"CUDA_VISIBLE_DEVICES=(\S+)", line) for line in dry.stdout.splitlines()]
    assert told == [[gpus] if gpus not in ("", "none") else [] for gpus in seen]


def test_one_process_has_all_gpus_and_three_are_refused(tmp_path: Path):
    cluster = Cluster(tmp_path)
    cluster.add(*GPUS)
    script = "echo ${CUDA_VISIBLE_DEVICES-all}"
    assert cluster.run("local.sh", "1", "bash", "-c", script, JAX_PLATFORMS="").stdout == "[0] all\n"
    refused = cluster.run("local.sh", "3", "bash", "-c", script, JAX_PLATFORMS="")
    assert refused.returncode == 2
    assert "4 GPUs and 3 processes: start a number that divides the GPUs" in refused.stderr


def test_a_signal_while_processes_start_reaches_every_one(tmp_path):
    """Those that are not there yet, too: none is left behind."""
    script = f"trap 'exit 75' TERM; touch {tmp_path}/$JAX_PROCESS_ID; for ((i = 0; i < 200; i++)); do sleep 0.05; done"
    with subprocess.Popen([LAUNCH, "24", "bash", "-c", script], stderr=subprocess.PIPE) as running:
        while not (tmp_path / "0").exists():
            assert running.poll() is None
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=60) != 0
    left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False)
    assert left.stdout == ""


def test_a_dry_run_prints_the_command_of_each_process_and_starts_none(tmp_path):
    started = tmp_path / "started"
    command = [LAUNCH, "2", "touch", started, "a b", "it's"]
    dry = subprocess.run(command, env=os.environ | {"DRY_RUN": "1"}, capture_output=True, text=True, check=True)
    address, *others = {line.split()[0] for line in dry.stdout.splitlines()}
    assert re.fullmatch(r"JAX_COORDINATOR_ADDRESS=127\.0\.0\.1:\d+", address)
    assert others == []
    assert [shlex.split(line)[1:] for line in dry.stdout.splitlines()] == [
        ["JAX_NUM_PROCESSES=2", f"JAX_PROCESS_ID={number}", "touch", str(started), "a b", "it's"] for number in range(2)
    ]
    assert not started.exists()


def test_a_dry_run_that_is_neither_wanted_nor_not_is_refused():
    refused = subprocess.run(
        [LAUNCH, "2", "true"], env=os.environ | {"DRY_RUN": "no"}, capture_output=True, text=True, check=False
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "launch/local.sh: DRY_RUN is 'no': set 1, or leave it out\n"


@pytest.mark.parametrize("number", ["0", "two", "-1"])
def test_a_number_that_is_none_is_refused(number):
    done = launch(number, "echo started")
    assert done.returncode == 2
    assert "usage: launch/local.sh NUM_PROCESSES COMMAND" in done.stderr
    assert done.stdout == ""
