"""What launch/gke/render.py renders, and that the manifests beside it are just that."""

import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from launch.gke import render
from lmjax.cli.main import COMMANDS
from lmjax.errors import PreemptedError
from lmjax.mesh import MeshConfig, axis_sizes
from lmjax.plan.topology import parse_topology
from tests.launch.stubs import LAUNCH, Cluster

pytestmark = pytest.mark.fast

EXAMPLES = sorted((LAUNCH / "gke").glob("*.yaml"))


def run(*arguments: str) -> Result:
    app = typer.Typer(add_completion=False)
    app.command()(render.main)
    return CliRunner().invoke(app, arguments)


def rendered(topology: str, *options: str, command: tuple[str, ...] = ("lmjax", "info")) -> dict[str, Any]:
    result = run("--topology", topology, "--image", "image", *options, "--", *command)
    assert result.exit_code == 0, result.output
    return yaml.safe_load(result.stdout)


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    return line


def job_of(manifest: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    return job_of(manifest)["template"]["spec"]


def container_of(manifest: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod_of(manifest)["containers"]
    return container


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_a_manifest_is_what_its_own_head_renders(path: Path):
    text = path.read_text()
    head = " ".join(line.removeprefix("#").removesuffix("\\").strip() for line in text.splitlines() if line[:1] == "#")
    python, script, *arguments = shlex.split(head[head.index("python launch") :])
    assert (python, script) == ("python", "launch/gke/render.py")
    assert run(*arguments).stdout == text
    assert max(map(len, text.splitlines())) <= 120


def test_there_is_one_for_tpus_and_one_for_gpus():
    assert [path.name for path in EXAMPLES] == ["gpu_h200.yaml", "tpu_v6e.yaml"]


@pytest.mark.parametrize(("path", "topology"), [("tpu_v6e.yaml", "2xv6e:4x4"), ("gpu_h200.yaml", "4xh200:8")])
def test_the_mesh_of_a_manifest_has_the_devices_of_its_hosts(path: str, topology: str):
    manifest = yaml.safe_load((LAUNCH / "gke" / path).read_text())
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job, container = job_of(manifest), container_of(manifest)
    (devices,) = container["resources"]["limits"].values()
    assert job["parallelism"] == job["completions"]
    assert replicated["replicas"] * job["parallelism"] * devices == parse_topology(topology).num_devices
    words = container["command"]
    sizes = dict(word.removeprefix("mesh.").split("=") for word in words if word.startswith("mesh."))
    mesh = MeshConfig(**{axis: int(size) for axis, size in sizes.items()})
    axis_sizes(mesh, parse_topology(topology).num_devices)
    assert mesh.dcn_data * mesh.dcn_fsdp == parse_topology(topology).slices
    assert words[0] == "lmjax"
    assert words[1] in COMMANDS


@pytest.mark.parametrize("topology", ["v5e:4x4", "2xh100:8"])
def test_it_starts_again_after_a_saved_state_and_retries_no_pod_alone(topology: str):
    manifest = rendered(topology)
    job = job_of(manifest)
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    on_exit, on_condition = job["podFailurePolicy"]["rules"]
    assert (on_exit["action"], on_condition["action"]) == ("FailJob", "FailJob")
    assert on_condition["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert on_exit["onExitCodes"]["values"] == [PreemptedError.exit_code]
    assert on_exit["onExitCodes"]["containerName"] == container_of(manifest)["name"]
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 3
    (rule,) = policy["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"


@pytest.mark.parametrize(
    ("topology", "kind", "shape", "slices", "hosts"),
    [
        ("v4:2x2x4", "tpu-v4-podslice", "2x2x4", 1, 4),
        ("v5e:1x1", "tpu-v5-lite-podslice", "1x1", 1, 1),
        ("v5e:2x2", "tpu-v5-lite-podslice", "2x2", 1, 1),
        ("v5e:2x4", "tpu-v5-lite-podslice", "2x4", 1, 2),
        ("v5e:16x16", "tpu-v5-lite-podslice", "16x16", 1, 64),
        ("2xv5p:4x4x8", "tpu-v5p-slice", "4x4x8", 2, 32),
        ("v5p:8x4x4", "tpu-v5p-slice", "4x4x8", 1, 32),
        ("v5p:2x2x1", "tpu-v5p-slice", "2x2x1", 1, 1),
        ("3xv6e:8x8", "tpu-v6e-slice", "8x8", 3, 16),
        ("tpu7x:4x4x4", "tpu7x", "4x4x4", 1, 16),
    ],
)
def test_a_slice_is_a_job_of_hosts_with_four_chips_or_the_only_one(
    topology: str, kind: str, shape: str, slices: int, hosts: int
):
    manifest = rendered(topology)
    pod, container = pod_of(manifest), container_of(manifest)
    (replicated,) = manifest["spec"]["replicatedJobs"]
    assert (replicated["replicas"], job_of(manifest)["parallelism"], job_of(manifest)["completions"]) == (
        slices,
        hosts,
        hosts,
    )
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": kind,
        "cloud.google.com/gke-tpu-topology": shape,
    }
    assert container["resources"]["limits"] == {"google.com/tpu": math.prod(map(int, shape.split("x"))) // hosts}
    assert [port["containerPort"] for port in container["ports"]] == [8471, 8482]
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert "env" not in container
    annotation = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert manifest["metadata"]["annotations"] == {annotation: "cloud.google.com/gke-nodepool"}


def test_a_host_may_have_all_eight_chips():
    manifest = rendered("v6e:2x4", "--chips-per-host", "8")
    assert job_of(manifest)["parallelism"] == 1
    assert container_of(manifest)["resources"]["limits"] == {"google.com/tpu": 8}


@pytest.mark.parametrize(
    ("topology", "options", "kind", "hosts", "gpus"),
    [
        ("a100:8", (), "nvidia-a100-80gb", 1, 8),
        ("2xh100:8", (), "nvidia-h100-mega-80gb", 2, 8),
        ("2xh100:8", ("--accelerator", "nvidia-h100-80gb"), "nvidia-h100-80gb", 2, 8),
        ("16xh200:8", (), "nvidia-h200-141gb", 16, 8),
        ("b200:4", (), "nvidia-b200", 1, 4),
    ],
)
def test_hosts_with_gpus_find_each_other_by_the_name_of_the_first(
    topology: str, options: tuple[str, ...], kind: str, hosts: int, gpus: int
):
    manifest = rendered(topology, "--name", "big-run", *options)
    job, pod, container = job_of(manifest), pod_of(manifest), container_of(manifest)
    (replicated,) = manifest["spec"]["replicatedJobs"]
    assert (replicated["replicas"], job["parallelism"], job["completions"]) == (1, hosts, hosts)
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": kind}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": gpus}
    variables = {entry["name"]: entry for entry in container["env"]}
    assert list(variables) == ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
    address, port = variables["JAX_COORDINATOR_ADDRESS"]["value"].split(":")
    network = manifest["spec"]["network"]
    assert network["enableDNSHostnames"]
    assert address == f"{manifest['metadata']['name']}-{replicated['name']}-0-0.{network['subdomain']}"
    assert [entry["containerPort"] for entry in container["ports"]] == [int(port)]
    assert variables["JAX_NUM_PROCESSES"]["value"] == str(hosts)
    path = variables["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert job["completionMode"] == "Indexed"
    (volume,) = pod["volumes"]
    assert volume["emptyDir"] == {"medium": "Memory"}
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]


def test_words_arrive_as_they_were_given():
    words = (
        "lmjax",
        "prompts=[a b]",
        "it's",
        '"',
        "$HOME",
        "$(HOME)",
        "$$",
        "a\nb",
        "yes",
        "075",
        "é",
        "- x: y",
        "#",
        "",
    )
    options = ("--env", "A=b=c $(D)", "--env", "EMPTY=")
    result = run("--topology", "v5e:4x4", "--image", "image", *options, "--", *words)
    container = container_of(yaml.safe_load(result.stdout))
    assert [unescaped(word) for word in container["command"]] == list(words)
    assert [(entry["name"], unescaped(entry["value"])) for entry in container["env"]] == [
        ("A", "b=c $(D)"),
        ("EMPTY", ""),
    ]
    assert all(line[:1] != "#" for line in result.stdout[result.stdout.index("apiVersion") :].splitlines())


def unescaped(text: str) -> str:
    """As Kubernetes does, where no variable is named."""
    parts = text.split("$$")
    assert all("$" not in part for part in parts)
    return "$".join(parts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology", "cpu:8"), "topology 'cpu:8': a JobSet here is for TPUs and GPUs, such as v6e:4x4 or 2xh200:8"),
        (("--topology", "v7:4x4"), "topology 'v7:4x4': not known"),
        (("--topology", "v5e:3x3"), "topology 'v5e:3x3': v5e does not come in 3x3. Near it are"),
        (("--topology", "2xv5e:2x2"), "topology '2xv5e:2x2': GKE joins slices of two hosts and more"),
        (("--topology", "2xv6e:2x4", "--chips-per-host", "8"), "GKE joins slices of two hosts and more"),
        (("--topology", "v6e:4x4", "--chips-per-host", "8"), "--chips-per-host 8: nodes of v6e:4x4 have 4"),
        (("--topology", "v6e:2x4", "--chips-per-host", "2"), "--chips-per-host 2: nodes of v6e:2x4 have 4 or 8"),
        (("--topology", "h200:8", "--chips-per-host", "8"), "--chips-per-host 8 is for TPUs, and h200:8 has GPUs"),
        (
            ("--topology", "h200:8", "--accelerator", "nvidia-l4"),
            "--accelerator 'nvidia-l4': h200 nodes are nvidia-h200-141gb",
        ),
        (("--topology", "v6e:4x4", "--accelerator", "tpu7x"), "--accelerator 'tpu7x': v6e nodes are tpu-v6e-slice"),
        (("--topology", "v6e:4x4", "--env", "A"), "--env 'A': it has to be NAME=VALUE"),
        (("--topology", "v6e:4x4", "--env", "A-B=1"), "--env 'A-B=1': it has to be NAME=VALUE"),
        (("--topology", "v6e:4x4", "--env", "A=1", "--env", "A=2"), "--env A is given twice"),
        (
            ("--topology", "h200:8", "--env", "JAX_PROCESS_ID=1"),
            "--env JAX_PROCESS_ID is what the manifest itself sets",
        ),
        (("--topology", "v6e:4x4", "--name", "My_Run"), "--name 'My_Run': at most 40 lower-case letters, digits and -"),
        (("--topology", "v6e:4x4", "--name", "a" * 41), "--name 'aaaaa"),
        (("--topology", "v6e:4x4", "--image", " "), "--image is empty"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: tuple[str, ...], message: str):
    image = () if "--image" in arguments else ("--image", "image")
    line = refused(*arguments, *image, "--", "lmjax", "info")
    assert line.startswith("launch/gke/render.py: ")
    assert message in line


def test_a_command_has_to_be_there():
    assert run("--topology", "v6e:4x4", "--image", "image").exit_code == 2
    assert "the command is empty" in refused("--topology", "v6e:4x4", "--image", "image", "--", "")


@pytest.mark.slow
def test_kubectl_is_given_the_manifest(tmp_path: Path):
    cluster = Cluster(tmp_path)
    cluster.add("kubectl", f'cat >"{tmp_path}/applied"')
    arguments = "--topology v6e:4x4 --image image -- lmjax train a.yaml --dry-run"
    line = f"{sys.executable} launch/gke/render.py {arguments} | kubectl apply -f -"
    environment = cluster.command("local.sh")[1]
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line], cwd=LAUNCH.parent, env=environment, check=True, timeout=120
    )
    assert cluster.calls == [["kubectl", "apply", "-f", "-"]]
    assert container_of(yaml.safe_load((tmp_path / "applied").read_text()))["command"][-1] == "--dry-run"
