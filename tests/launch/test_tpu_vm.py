"""What launch/tpu_vm.sh asks of gcloud, with a stub in its place."""

from pathlib import Path

import pytest

from tests.launch.stubs import Cluster

pytestmark = pytest.mark.fast


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def launch(cluster: Cluster, ssh: list[str], states: list[str], *command: str):
    """``ssh`` and ``states`` are what each call of these does."""
    shown = [f"echo {state}" for state in states]
    cluster.add("gcloud", f"if [[ $4 == ssh ]]; then\n{cluster.once(*ssh)}\nelse\n{cluster.once(*shown, 'exit 1')}\nfi")
    return cluster.run("tpu_vm.sh", "pod", "zone-a", *command, TPU_POLL_SECONDS="0")


def test_all_hosts_run_the_command_as_it_was_given(cluster: Cluster):
    ended = launch(cluster, ['eval "${!##--command=}"'], [], "printf", "<%s>", "prompts=[a b]", "x'y")
    assert (ended.returncode, ended.stdout) == (0, "<prompts=[a b]><x'y>")
    (call,) = cluster.calls
    assert call[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=zone-a"]
    assert "--worker=all" in call


def test_a_stop_with_a_saved_state_starts_again_once_the_tpu_is_ready(cluster: Cluster):
    ended = launch(cluster, ["exit 75", "exit 75", "exit 3"], ["REPAIRING", "READY", "READY"], "lmjax")
    assert ended.returncode == 3
    words = [call[4] for call in cluster.calls]
    assert words == ["ssh", "describe", "describe", "ssh", "describe", "ssh"]


def test_a_tpu_that_is_gone_is_not_waited_for(cluster: Cluster):
    ended = launch(cluster, ["exit 75"], ["PREEMPTED"], "lmjax")
    assert ended.returncode == 75
    assert "pod is PREEMPTED" in ended.stderr


def test_a_tpu_that_nobody_knows_any_more_ends_it(cluster: Cluster):
    assert launch(cluster, ["exit 75"], [], "lmjax").returncode == 75


@pytest.mark.parametrize("code", [0, 2, 3, 255])
def test_any_other_exit_code_is_returned(cluster: Cluster, code: int):
    assert launch(cluster, [f"exit {code}"], [], "lmjax").returncode == code
    assert len(cluster.calls) == 1


def test_too_few_arguments_say_how_it_is_used(cluster: Cluster):
    ended = cluster.run("tpu_vm.sh", "pod", "zone-a")
    assert ended.returncode == 2
    assert "usage: launch/tpu_vm.sh NAME ZONE COMMAND" in ended.stderr
