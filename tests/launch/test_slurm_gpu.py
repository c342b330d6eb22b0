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
    assert options == ["--kill-on-bad-exit=0", "--wait=120", "bash", "-c", 'echo "$1"', "_", "prompts=[a b]"]


def test_the_command_has_the_cpus_that_the_job_has(cluster: Cluster):
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "96", "SLURM_CPUS_ON_NODE": "96", "SLURM_GPUS_ON_NODE": "8"}
    assert cluster.run("slurm_gpu.sh", "true", **job).returncode == 0
    assert cluster.calls == [["srun", "--kill-on-bad-exit=0", "--wait=120", "--cpus-per-task=96", "true"]]


def test_fewer_cpus_than_gpus_are_refused(cluster: Cluster):
    ended = cluster.run(
        "slurm_gpu.sh", "true", SLURM_JOB_ID="7", SLURM_CPUS_ON_NODE="1", SLURM_GPUS_ON_NODE="8", DRY_RUN=""
    )
    assert ended.returncode == 2
    assert "1 CPUs for 8 GPUs: give sbatch --exclusive, or more CPUs by --cpus-per-task" in ended.stderr
    assert cluster.calls == []


def test_a_stop_with_a_saved_state_puts_the_job_back(cluster: Cluster):
    assert cluster.run("slurm_gpu.sh", "bash", "-c", "exit 75", SLURM_JOB_ID="7").returncode == 75
    assert cluster.calls[1:] == [["scontrol", "requeue", "7"]]


@pytest.mark.parametrize("code", [0, 2, 3, 4, 143])
def test_any_other_end_is_the_end_of_the_job(cluster: Cluster, code: int):
    assert cluster.run("slurm_gpu.sh", "bash", "-c", f"exit {code}", SLURM_JOB_ID="7").returncode == code
    assert [call[0] for call in cluster.calls] == ["srun"]


def test_a_virtual_environment_comes_first_on_the_path(cluster: Cluster, tmp_path: Path):
    programs = tmp_path / "a venv" / "bin"
    programs.mkdir(parents=True)
    program = programs / "lmjax"
    program.write_text('#!/bin/sh\necho "$VIRTUAL_ENV: $*"\n')
    program.chmod(0o755)
    ended = cluster.run("slurm_gpu.sh", "lmjax", "train", VENV=str(programs.parent), SLURM_JOB_ID="7")
    assert (ended.returncode, ended.stdout) == (0, f"{programs.parent}: train\n")


def test_a_container_runs_by_pyxis_with_what_it_may_see(cluster: Cluster):
    variables = {
        "CONTAINER": "images.example.com#team/lmjax:1",
        "CONTAINER_MOUNTS": "/shared:/shared,/my data:/data:ro",
    }
    assert cluster.run("slurm_gpu.sh", "true", **variables, SLURM_JOB_ID="7").returncode == 0
    image, mounts = f"--container-image={variables['CONTAINER']}", f"--container-mounts={variables['CONTAINER_MOUNTS']}"
    assert cluster.calls == [["srun", "--kill-on-bad-exit=0", "--wait=120", image, mounts, "true"]]


def test_a_container_needs_no_mounts(cluster: Cluster):
    assert cluster.run("slurm_gpu.sh", "true", CONTAINER="/images/jax.sqsh", SLURM_JOB_ID="7").returncode == 0
    assert cluster.calls[0][3:] == ["--container-image=/images/jax.sqsh", "true"]


@pytest.mark.parametrize("variables", [{}, {"VENV": "venv"}, {"CONTAINER": "a b", "CONTAINER_MOUNTS": "/a:/a"}])
def test_a_dry_run_prints_what_a_run_calls(cluster: Cluster, tmp_path: Path, variables: dict[str, str]):
    if "VENV" in variables:
        (tmp_path / "venv" / "bin").mkdir(parents=True)
        variables = {"VENV": str(tmp_path / "venv")}
    command = ["echo", "it's", "prompts=[a b]", "$HOME", "a\nb"]
    dry = cluster.run("slurm_gpu.sh", *command, **variables, DRY_RUN="1")
    assert (dry.returncode, dry.stderr, cluster.calls) == (0, "", [])
    assert cluster.run("slurm_gpu.sh", *command, **variables, SLURM_JOB_ID="7").returncode == 0
    assert cluster.shell_calls(dry.stdout) == cluster.calls


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"VENV": "/nowhere", "CONTAINER": "jax"}, "VENV and CONTAINER are both set"),
        ({"CONTAINER_MOUNTS": "/a:/a"}, "CONTAINER_MOUNTS without CONTAINER: set CONTAINER to an image"),
        ({"VENV": "/nowhere"}, "VENV is '/nowhere', which has no bin/"),
        ({"DRY_RUN": "yes"}, "DRY_RUN is 'yes': set 1, or leave it out"),
    ],
)
def test_variables_that_make_no_sense_are_refused(cluster: Cluster, variables: dict[str, str], message: str):
    ended = cluster.run("slurm_gpu.sh", "true", **variables, SLURM_JOB_ID="7")
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"launch/slurm_gpu.sh: {message}")
    assert cluster.calls == []


@pytest.mark.parametrize("missing", ["srun", "scontrol"])
def test_without_slurm_it_says_what_is_missing(cluster: Cluster, missing: str):
    (cluster.directory / missing).unlink()
    ended = cluster.run("slurm_gpu.sh", "true", SLURM_JOB_ID="7", PATH=cluster.bare_path())
    assert ended.returncode == 2
    message = f"launch/slurm_gpu.sh: {missing} is not on PATH: start this by sbatch on a Slurm cluster\n"
    assert ended.stderr == message
    assert cluster.calls == []


@pytest.mark.parametrize(("arguments", "job"), [((), "7"), (("true",), "")])
def test_without_a_command_or_a_job_it_says_how_it_is_used(cluster: Cluster, arguments: tuple[str, ...], job: str):
    ended = cluster.run("slurm_gpu.sh", *arguments, SLURM_JOB_ID=job)
    assert ended.returncode == 2
    assert "usage: sbatch" in ended.stderr
    assert cluster.calls == []
