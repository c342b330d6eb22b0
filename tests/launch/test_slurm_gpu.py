"""What launch/slurm_gpu.sh asks of Slurm, with a stub in the place of srun and scontrol."""

from pathlib import Path

import pytest

from tests.launch.stubs import Cluster

pytestmark = pytest.mark.fast

RUN_TASK = 'while [[ $1 == --* ]]; do shift; done; "$@"'
"""What srun does, for one task."""


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    cluster = Cluster(tmp_path)
    cluster.add("srun", RUN_TASK)
    cluster.add("scontrol", "exit 0")
    return cluster


def test_the_command_is_started_as_it_was_given(cluster: Cluster):
    ended = cluster.run("slurm_gpu.sh", "bash", "-c", 'echo "$1"', "_", "prompts=[a b]", SLURM_JOB_ID="7")
    assert (ended.returncode, ended.stdout) == (0, "prompts=[a b]\n")
    ((name, *options),) = cluster.calls
    assert name == "srun"
    assert options[:2] == ["--kill-on-bad-exit=0", "--wait=120"]


def test_a_stop_with_a_saved_state_puts_the_job_back(cluster: Cluster):
    assert cluster.run("slurm_gpu.sh", "bash", "-c", "exit 75", SLURM_JOB_ID="7").returncode == 75
    assert cluster.calls[1:] == [["scontrol", "requeue", "7"]]


@pytest.mark.parametrize("code", [0, 2, 3, 4, 143])
def test_any_other_end_is_the_end_of_the_job(cluster: Cluster, code: int):
    assert cluster.run("slurm_gpu.sh", "bash", "-c", f"exit {code}", SLURM_JOB_ID="7").returncode == code
    assert [call[0] for call in cluster.calls] == ["srun"]


@pytest.mark.parametrize(("arguments", "job"), [((), "7"), (("true",), "")])
def test_without_a_command_or_a_job_it_says_how_it_is_used(cluster: Cluster, arguments: tuple[str, ...], job: str):
    ended = cluster.run("slurm_gpu.sh", *arguments, SLURM_JOB_ID=job)
    assert ended.returncode == 2
    assert "usage: sbatch" in ended.stderr
    assert cluster.calls == []
