"""How launch/tpu_vm.sh makes a TPU by a queued resource, and makes it anew when it is preempted."""

from pathlib import Path

import pytest

from tests.launch.google import ABSENT, DENIED, MADE, Google

pytestmark = pytest.mark.fast


@pytest.fixture
def google(tmp_path: Path) -> Google:
    return Google(tmp_path)


def test_it_is_made_where_there_is_none_and_waited_for(google: Google):
    states = [
        ABSENT,
        "CREATING",
        "ACCEPTED",
        "WAITING_FOR_RESOURCES",
        "WAITING_FOR_RESOURCES",
        "PROVISIONING",
        "ACTIVE",
    ]
    google.answers(queued=states)
    ended = google.launch("echo", "trains", **MADE)
    assert (ended.returncode, ended.stdout) == (0, "[host-of-pod] trains\n")
    assert google.words == ["queued describe", "queued create", *["queued describe"] * 6, "ssh"]
    assert google.calls[1] == [
        *("gcloud", "compute", "tpus", "queued-resources", "create", "pod", "--zone=zone-a", "--node-id=pod"),
        *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--quiet"),
    ]
    assert ended.stderr.count("the queued resource pod is WAITING_FOR_RESOURCES") == 1


def test_it_may_be_of_spot_capacity_in_a_project(google: Google):
    google.answers(queued=[ABSENT, "ACTIVE"])
    assert google.launch("true", **MADE, SPOT="1", PROJECT="mine").returncode == 0
    assert "--spot" in google.calls[1]
    assert all("--project=mine" in call for call in google.calls)


def test_one_that_is_there_is_used(google: Google):
    assert google.launch("true", **MADE).returncode == 0
    assert google.words == ["queued describe", "ssh"]


def test_one_that_is_being_deleted_is_waited_for_and_made_anew(google: Google):
    google.answers(queued=["DELETING", ABSENT, "ACTIVE"])
    assert google.launch("true", **MADE).returncode == 0
    assert google.words == ["queued describe", "queued describe", "queued create", "queued describe", "ssh"]


def test_one_that_was_preempted_before_is_deleted_and_made_anew(google: Google):
    google.answers(queued=["SUSPENDING", "SUSPENDED", "ACTIVE"])
    assert google.launch("true", **MADE).returncode == 0
    assert google.words[2:] == ["queued delete", "queued create", "queued describe", "ssh"]
    assert google.calls[2][4:] == ["delete", "pod", "--zone=zone-a", "--force", "--quiet"]


@pytest.mark.parametrize("code", [1, 75, 255])
@pytest.mark.parametrize("states", [["SUSPENDED", "SUSPENDED"], ["SUSPENDING", "SUSPENDING", "SUSPENDED"]])
def test_a_preemption_makes_it_anew_and_starts_again(google: Google, code: int, states: list[str]):
    google.answers(queued=["ACTIVE", *states, "PROVISIONING", "ACTIVE"], ssh=[f"exit {code}", "exit 0"])
    assert google.launch("lmjax", **MADE).returncode == 0
    made_anew = ["queued delete", "queued create", "queued describe", "queued describe", "ssh"]
    assert google.words == ["queued describe", "ssh", *["queued describe"] * len(states), *made_anew]


def test_a_node_that_is_gone_before_its_queued_resource_says_so_is_a_preemption(google: Google):
    google.answers(ssh=["exit 255", "exit 0"], node=["PREEMPTED"])
    assert google.launch("lmjax", **MADE).returncode == 0
    assert google.words[2:6] == ["queued describe", "describe", "queued delete", "queued create"]


@pytest.mark.parametrize("state", [ABSENT, "DELETING"])
def test_one_that_somebody_deleted_is_not_made_anew(google: Google, state: str):
    google.answers(queued=["ACTIVE", state], ssh=["exit 255"])
    ended = google.launch("lmjax", **MADE)
    assert ended.returncode == 75
    assert "somebody has deleted pod, so it is not made anew" in ended.stderr
    assert "queued create" not in google.words
    assert "cost money" not in ended.stderr


def test_a_request_that_fails_ends_it_and_says_how_to_see_why(google: Google):
    google.answers(queued=[ABSENT, "FAILED"])
    ended = google.launch("lmjax", **MADE)
    assert ended.returncode == 1
    assert "pod is FAILED. To see why: gcloud compute tpus queued-resources describe pod --zone=zone-a" in ended.stderr
    assert "ssh" not in google.words


def test_a_request_that_is_refused_ends_it_with_the_code_of_gcloud(google: Google):
    google.answers(queued=[ABSENT, ABSENT], create="echo 'ERROR: no quota' >&2; exit 3")
    ended = google.launch("lmjax", **MADE)
    assert ended.returncode == 3
    assert "no quota" in ended.stderr
    assert "could not be made" in ended.stderr
    assert "cost money" not in ended.stderr


@pytest.mark.parametrize("state", ["CREATING", DENIED])
def test_what_may_have_been_made_when_gcloud_failed_is_told(google: Google, state: str):
    google.answers(queued=[ABSENT, *[state] * 5], create="echo 'ERROR: connection lost' >&2; exit 1")
    ended = google.launch("lmjax", **MADE)
    assert ended.returncode == 1
    assert "could not be made" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("gcloud compute tpus queued-resources delete pod")


def test_a_deletion_that_is_refused_ends_it(google: Google):
    google.answers(queued=["SUSPENDED"], delete="exit 4")
    assert google.launch("lmjax", **MADE).returncode == 4
    assert google.words == ["queued describe", "queued delete"]


def test_a_state_that_cannot_be_told_at_the_start_ends_it_at_once(google: Google):
    google.answers(queued=[DENIED])
    ended = google.launch("lmjax", **MADE)
    assert ended.returncode == 1
    assert "PERMISSION_DENIED" in ended.stderr
    assert google.words == ["queued describe"]


@pytest.mark.parametrize("code", [0, 3])
def test_it_says_what_is_left_and_what_deletes_it(google: Google, code: int):
    ended = google.launch("bash", "-c", f"exit {code}", **MADE, PROJECT="mine")
    assert ended.returncode == code
    command = "gcloud compute tpus queued-resources delete pod --zone=zone-a --project=mine --force --quiet"
    assert "still exists, and its TPUs cost money" in ended.stderr
    assert ended.stderr.splitlines()[-1] == command


def test_setup_under_which_the_tpu_is_preempted_runs_again_on_the_new_one(google: Google):
    queued = ["ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"]
    google.answers(queued=queued, ssh=["exit 255", "exit 0", "exit 0"])
    assert google.launch("lmjax", **MADE, SETUP="install").returncode == 0
    assert google.words.count("ssh") == 3


def test_several_slices_are_of_one_queued_resource_and_run_at_once(google: Google, tmp_path: Path):
    google.answers(queued=[ABSENT, "ACTIVE"])
    # Each waits for the other.
    meet = (
        f'cd {tmp_path}; touch "$HOSTNAME"; while [[ ! -e host-of-pod-0 || ! -e host-of-pod-1 ]]; do sleep 0.02; done'
    )
    ended = google.launch("bash", "-c", f"{meet}; echo met", **MADE, SLICES="2", LOGS=str(tmp_path / "logs"))
    assert ended.returncode == 0
    assert sorted(ended.stdout.splitlines()) == ["[host-of-pod-0] met", "[host-of-pod-1] met"]
    assert google.calls[1][5:9] == ["pod", "--zone=zone-a", "--node-count=2", "--node-prefix=pod"]
    assert sorted(call[5] for call in google.calls[3:]) == ["pod-0", "pod-1"]
    assert (tmp_path / "logs" / "host-of-pod-1.log").read_text() == "met\n"
