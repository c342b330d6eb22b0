"""Print a JobSet that runs one command on slices of TPUs, or on hosts with GPUs, of a GKE cluster.

    python launch/gke/render.py --topology 2xv6e:4x4 --image IMAGE -- lmjax train /experiments/my.yaml mesh.data=2 \
      mesh.dcn_data=2 mesh.fsdp=16 run_dir=gs://BUCKET/runs/big | kubectl apply -f -

The topology is named as `lmjax plan` names it. The cluster needs the controller of JobSet, version 0.6 or newer, and
nodes of that kind. Everything that the manifest says follows from the command line; nothing is asked of a cluster.
"""

import math
import re
import shlex
import sys
from typing import Annotated, Any, NamedTuple

import typer

from lmjax.config import to_yaml_text
from lmjax.errors import InputError, PreemptedError
from lmjax.plan.topology import Topology, parse_topology, sizes_text

TPU_NODES = {
    # Values of cloud.google.com/gke-tpu-accelerator, from Google's page "Plan TPUs in GKE".
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
GPU_NODES = {
    # Values of cloud.google.com/gke-accelerator, the first of each for nodes of several hosts.
    "a100": ("nvidia-a100-80gb",),
    "h100": ("nvidia-h100-mega-80gb", "nvidia-h100-80gb"),
    "h200": ("nvidia-h200-141gb",),
    "b200": ("nvidia-b200",),
}

CHIPS_PER_HOST = 4
"""Of every TPU machine type for training. v5e and v6e have those of one and of eight too, each a slice of its own."""

ICI_PORT = 8471
"""Between the TPU runtimes of a slice."""
COORDINATOR_PORT = 8482
"""Of process 0, by which all find each other. JAX's own choice on TPUs, which its other processes count on."""

MAX_RESTARTS = 3
GRACE_SECONDS = 300
"""From TERM to KILL, for the last checkpoint."""
NAME_LENGTH = 40
"""So that the names of pods keep to the 63 characters that a host's name may have."""

INDEX_ANNOTATION = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


class Pods(NamedTuple):
    """What differs between TPUs and GPUs."""

    job: str
    """What each of the replicated jobs stands for."""
    jobs: int
    pods: int
    """Of each job, on a host each."""
    resource: str
    devices: int
    """Of each pod."""
    nodes: dict[str, str]
    """Labels that its node has to have."""
    text: str
    """All of it, in words."""


def main(
    command: Annotated[list[str], typer.Argument(help="What each host runs; after --.", show_default=False)],
    topology: Annotated[str, typer.Option(help="As 2xv6e:4x4 (two slices) or 4xh200:8 (four hosts).")],
    image: Annotated[str, typer.Option(help="Container image that has the command.")],
    name: Annotated[str, typer.Option(help="Of the JobSet.")] = "lmjax",
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for each host; may be repeated.")] = None,
    accelerator: Annotated[
        str | None, typer.Option(help="Kind of the nodes, where GKE has several for a generation: nvidia-h100-80gb.")
    ] = None,
    chips_per_host: Annotated[
        int | None, typer.Option(help="8 for nodes with all eight chips of a v5e:2x4 or v6e:2x4.")
    ] = None,
) -> None:
    """Print a JobSet for `kubectl apply -f -` that runs COMMAND on every host of a topology."""
    try:
        pods = find_pods(parse_topology(topology), accelerator, chips_per_host)
        manifest = jobset(pods, command, image=image, name=name, variables=parse_variables(env or []))
    except InputError as error:
        print(f"launch/gke/render.py: {error}", file=sys.stderr)
        raise SystemExit(InputError.exit_code) from error
    options = [("--topology", topology), ("--image", image)]
    options += [("--name", name)] if name != "lmjax" else []
    options += [("--env", variable) for variable in env or []]
    options += [("--accelerator", accelerator)] if accelerator else []
    options += [("--chips-per-host", str(chips_per_host))] if chips_per_host else []
    print(head(pods, [*map(shlex.join, options), "--", *map(shlex.quote, command)]))
    print(to_yaml_text(manifest, width=math.inf, allow_unicode=True), end="")


def find_pods(topology: Topology, accelerator: str | None, chips_per_host: int | None) -> Pods:
    """Raises InputError for a topology that GKE does not have, or not so."""
    if topology.machine is None:
        raise InputError(
            f"topology {topology.name!r}: a JobSet here is for TPUs and GPUs, such as v6e:4x4 or 2xh200:8; on one "
            "machine's CPU, launch/local.sh starts processes"
        )
    if topology.generation in TPU_NODES:
        return _tpu_pods(topology, accelerator, chips_per_host)
    if chips_per_host is not None:
        raise InputError(f"--chips-per-host {chips_per_host} is for TPUs, and {topology.name} has GPUs: leave it out")
    kinds = GPU_NODES[topology.generation]
    if accelerator not in (None, *kinds):
        raise InputError(f"--accelerator {accelerator!r}: {topology.generation} nodes are {' or '.join(kinds)}")
    (gpus,) = topology.shape
    return Pods(
        job="hosts",
        jobs=1,
        pods=topology.slices,
        resource="nvidia.com/gpu",
        devices=gpus,
        nodes={"cloud.google.com/gke-accelerator": accelerator or kinds[0]},
        text=f"{_count(topology.slices, 'host')} with {_count(gpus, f'{topology.generation.upper()} GPU')}",
    )


def _tpu_pods(topology: Topology, accelerator: str | None, chips_per_host: int | None) -> Pods:
    kind, shape = TPU_NODES[topology.generation], tuple(sorted(topology.shape))
    if accelerator not in (None, kind):
        raise InputError(f"--accelerator {accelerator!r}: {topology.generation} nodes are {kind}")
    chips = math.prod(shape)
    whole = topology.generation in ("v5e", "v6e") and shape == (2, 4)
    usual = min(CHIPS_PER_HOST, chips)
    allowed = (usual, chips) if whole else (usual,)
    per_host = usual if chips_per_host is None else chips_per_host
    if per_host not in allowed:
        raise InputError(f"--chips-per-host {per_host}: nodes of {topology.name} have {' or '.join(map(str, allowed))}")
    hosts = chips // per_host
    if topology.slices > 1 and hosts == 1:
        raise InputError(
            f"topology {topology.name!r}: GKE joins slices of two hosts and more, and these have one of "
            f"{_count(per_host, 'chip')}: take larger slices"
        )
    return Pods(
        job="slice",
        jobs=topology.slices,
        pods=hosts,
        resource="google.com/tpu",
        devices=per_host,
        nodes={
            "cloud.google.com/gke-tpu-accelerator": kind,
            "cloud.google.com/gke-tpu-topology": sizes_text(shape),
        },
        text=f"{_count(topology.slices, 'slice')} of {chips} TPU {topology.generation.removeprefix('tpu')} chips, "
        f"{_count(hosts, 'host')} of {per_host} each",
    )


def parse_variables(env: list[str]) -> dict[str, str]:
    """NAME=VALUE of each; raises InputError for what is none."""
    variables: dict[str, str] = {}
    for word in env:
        name, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise InputError(f"--env {word!r}: it has to be NAME=VALUE, such as NCCL_DEBUG=INFO")
        if name in variables:
            raise InputError(f"--env {name} is given twice: keep one")
        variables[name] = value
    return variables


def jobset(pods: Pods, command: list[str], *, image: str, name: str, variables: dict[str, str]) -> dict[str, Any]:
    """The manifest. Raises InputError for a name or variables that Kubernetes or the manifest itself forbids."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > NAME_LENGTH:
        raise InputError(
            f"--name {name!r}: at most {NAME_LENGTH} lower-case letters, digits and -, beginning with a letter"
        )
    if not image.strip():
        raise InputError("--image is empty: name a container image that has lmjax")
    if not command[0]:
        raise InputError("the command is empty: give it after --, as -- lmjax train /experiments/my.yaml")
    container: dict[str, Any] = {
        "name": "lmjax",
        "image": image,
        "command": [_literal(word) for word in command],
        "ports": [{"containerPort": port} for port in _ports(pods)],
        "resources": {"limits": {pods.resource: pods.devices}},
        # A container has 64 MiB there, which is too little for NCCL and for the processes that read data.
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    environment = _environment(pods, name, variables)
    if environment:
        container["env"] = environment
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": pods.nodes,
        "containers": [container],
        "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}],
    }
    metadata: dict[str, Any] = {"name": name}
    if pods.job == "slice":
        # A node pool is one slice: no two jobs may share it.
        metadata["annotations"] = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    saved = {"containerName": container["name"], "operator": "In", "values": [PreemptedError.exit_code]}
    disrupted = {"type": "DisruptionTarget", "status": "True"}
    job = {
        "parallelism": pods.pods,
        "completions": pods.pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        # A node that is taken away may not leave the time to save.
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": saved},
                {"action": "FailJob", "onPodConditions": [disrupted]},
            ]
        },
        "template": {"spec": pod},
    }
    restart_preempted = {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "failurePolicy": {"maxRestarts": MAX_RESTARTS, "rules": [restart_preempted]},
            "replicatedJobs": [{"name": pods.job, "replicas": pods.jobs, "template": {"spec": job}}],
        },
    }


def _ports(pods: Pods) -> tuple[int, ...]:
    return (ICI_PORT, COORDINATOR_PORT) if pods.job == "slice" else (COORDINATOR_PORT,)


def _environment(pods: Pods, name: str, variables: dict[str, str]) -> list[dict[str, Any]]:
    """GKE itself tells TPU pods their slice and host (TPU_WORKER_*, MEGASCALE_*); GPU pods have lmjax's variables."""
    entries: list[dict[str, Any]] = []
    if pods.resource == "nvidia.com/gpu":
        # JobSet's name of the first pod: <jobset>-<replicated job>-<job index>-<pod index>.<subdomain>
        entries = [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-{pods.job}-0-0.{name}:{COORDINATOR_PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(pods.pods)},
            {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": INDEX_ANNOTATION}}},
        ]
    taken = [entry["name"] for entry in entries if entry["name"] in variables]
    if taken:
        raise InputError(f"--env {taken[0]} is what the manifest itself sets: leave it out")
    return entries + [{"name": key, "value": _literal(value)} for key, value in variables.items()]


def _literal(text: str) -> str:
    """Kubernetes takes $(NAME) for a variable, and $$ for $."""
    return text.replace("$", "$$")


def head(pods: Pods, words: list[str]) -> str:
    """What it is, and with which words it was rendered, as a comment."""
    saved = PreemptedError.exit_code
    text = [
        f"{pods.text}, as a JobSet for GKE (its controller: version 0.6 or newer).",
        "",
        f"A drained node sends TERM: lmjax saves and ends with {saved}. After that, or when a node was taken away",
        f"before, all start again, however often; after any other failure, {MAX_RESTARTS} times. Rendered by:",
        "",
        *_wrapped(["python launch/gke/render.py", *words]),
    ]
    # A word of the command may have line ends of its own.
    lines = [line for entry in text for line in entry.splitlines() or [""]]
    return "\n".join(f"# {line}".rstrip() for line in lines)


def _wrapped(words: list[str], width: int = 112) -> list[str]:
    lines = [f"  {words[0]}"]
    for word in words[1:]:
        if len(lines[-1]) + len(word) < width:
            lines[-1] += f" {word}"
        else:
            lines[-1] += " \\"
            lines.append(f"    {word}")
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
