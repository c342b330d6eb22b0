"""All launchers: the shell reads them, they can be run, and the JobSet's numbers fit each other."""

import math
import os
import subprocess

import pytest
import yaml

from lmjax.cli.main import COMMANDS
from lmjax.errors import PreemptedError
from lmjax.mesh import MeshConfig, axis_sizes
from tests.launch.stubs import LAUNCH

pytestmark = pytest.mark.fast

SCRIPTS = sorted(LAUNCH.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it_and_it_may_be_run(script):
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=True).stderr == ""
    assert f"{PreemptedError.exit_code}" in script.read_text()


def test_the_slices_hosts_and_chips_of_the_jobset_are_those_of_its_mesh():
    spec = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]
    (group,) = spec["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    sizes = dict(argument.removeprefix("mesh.").split("=") for argument in container["args"] if "mesh" in argument)
    mesh = MeshConfig(**{axis: int(size) for axis, size in sizes.items()})
    axis_sizes(mesh, chips * group["replicas"])
    assert mesh.dcn_data * mesh.dcn_fsdp == group["replicas"]
    assert container["command"][0] == "lmjax"
    assert container["command"][1] in COMMANDS


def test_the_jobset_starts_again_after_a_saved_state_and_retries_no_pod_alone():
    spec = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    (on_exit,) = job["podFailurePolicy"]["rules"]
    assert on_exit["onExitCodes"]["values"] == [PreemptedError.exit_code]
    assert on_exit["onExitCodes"]["containerName"] == job["template"]["spec"]["containers"][0]["name"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
