"""What launch/tpu_vm.sh asks of gcloud, with a stub in its place."""

import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.launch.google import ABSENT, DENIED, HOST, MADE, Google

pytestmark = pytest.mark.fast


@pytest.fixture
def google(tmp_path: Path) -> Google:
    return Google(tmp_path)


def test_all_hosts_run_the_command_as_it_was_given(google: Google):
    arguments = ["prompts=[a b]", "x'y", '"', "$HOME", "a\\b", "", ";", "*"]
    ended = google.launch("printf", "<%s>", *arguments)
    assert (ended.returncode, ended.stdout) == (0, f"[host-of-pod] {''.join(f'<{word}>' for word in arguments)}\n")
    (call,) = google.calls
    assert call[:-1] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=zone-a", "--worker=all"]


def test_every_line_of_a_host_has_its_name(google: Google):
    ended = google.launch("bash", "-c", "echo one; echo two >&2")
    assert sorted(ended.stdout.splitlines()) == ["[host-of-pod] one", "[host-of-pod] two"]


def test_a_stop_with_a_saved_state_starts_again_once_the_tpu_is_ready(google: Google):
    google.answers(ssh=["exit 75", "exit 75", "exit 3"], node=["REPAIRING", "READY", "READY", "READY"])
    assert google.launch("lmjax").returncode == 3
    assert google.words == ["ssh", "describe", "describe", "ssh", "describe", "ssh", "describe"]


@pytest.mark.parametrize("code", [1, 75, 255])
@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED", ABSENT])
def test_a_tpu_that_is_gone_is_not_waited_for(google: Google, code: int, state: str):
    google.answers(ssh=[f"exit {code}"], node=[state])
    ended = google.launch("lmjax")
    assert ended.returncode == 75
    assert f"pod is {'ABSENT' if state == ABSENT else state}: make the TPU anew" in ended.stderr


@pytest.mark.parametrize("code", [75, 4])
def test_a_state_that_gcloud_does_not_tell_is_asked_for_again_and_then_ends_it(google: Google, code: int):
    google.answers(ssh=[f"exit {code}"], node=[DENIED] * 5)
    ended = google.launch("lmjax")
    assert ended.returncode == code
    assert "PERMISSION_DENIED" in ended.stderr
    assert google.words == ["ssh", *["describe"] * 5]


def test_a_state_that_gcloud_tells_late_is_as_good(google: Google):
    google.answers(ssh=["exit 75", "exit 0"], node=[DENIED, DENIED, "READY"])
    assert google.launch("lmjax").returncode == 0


@pytest.mark.parametrize("code", [0, 2, 3, 137, 255])
def test_any_other_exit_code_is_returned(google: Google, code: int):
    ended = google.launch("bash", "-c", f"exit {code}")
    assert ended.returncode == code
    assert google.words == ["ssh", "describe"][: 1 + (code > 0)]


def test_a_failure_while_the_tpu_is_not_well_starts_again(google: Google):
    google.answers(ssh=["exit 255", "exit 0"], node=["REPAIRING", "REPAIRING", "READY"])
    assert google.launch("lmjax").returncode == 0
    assert google.words == ["ssh", "describe", "describe", "describe", "ssh"]


def test_a_command_that_a_signal_ends_does_not_end_the_shell_that_ssh_started(google: Google):
    assert google.launch("bash", "-c", "kill -KILL $$").returncode == 128 + signal.SIGKILL


def test_what_an_earlier_start_left_running_is_stopped_first(google: Google, tmp_path: Path):
    home = tmp_path / "home-pod"
    home.mkdir()
    with subprocess.Popen(["sleep", "60"]) as left:
        (home / ".lmjax-launch").write_text(f"{left.pid}\n")
        threading.Thread(target=left.wait).start()  # so that it is gone once it has ended
        assert google.launch("true").returncode == 0
        assert left.wait() == -signal.SIGTERM
    assert not (home / ".lmjax-launch").exists()


def test_setup_runs_once_on_each_host_before_the_command(google: Google, tmp_path: Path):
    setup = 'echo "it\'s installed" && echo x >>ran'
    for _ in range(2):
        ended = google.launch("echo", "trains", SETUP=setup)
        assert ended.returncode == 0
        assert ended.stdout.splitlines()[-1] == "[host-of-pod] trains"
    assert (tmp_path / "home-pod" / "ran").read_text() == "x\n"
    assert google.words == ["ssh"] * 4


def test_setup_runs_again_when_it_is_another_one_or_the_host_is_new(google: Google, tmp_path: Path):
    for setup in ("echo a >>ran", "echo b >>ran"):
        assert google.launch("true", SETUP=setup).returncode == 0
    assert (tmp_path / "home-pod" / "ran").read_text() == "a\nb\n"


def test_setup_that_fails_ends_it_with_its_code_and_the_command_is_not_run(google: Google):
    for _ in range(2):  # it has not run, so that the next start runs it again
        ended = google.launch("echo", "trains", SETUP="echo no such package; exit 9")
        assert ended.returncode == 9
        assert ended.stdout == "[host-of-pod] no such package\n"
        assert "SETUP ended with exit code 9" in ended.stderr


def test_what_the_hosts_print_is_gathered(google: Google, tmp_path: Path):
    google.answers(ssh=["echo 'Attempting to connect' >&2; echo '[w-0] a'; echo '[w-1] [b] c'; echo '[w-0] d'"] * 2)
    for _ in range(2):
        ended = google.launch("lmjax", LOGS=str(tmp_path / "logs" / "new"))
        assert ended.stdout.splitlines() == ["Attempting to connect", "[w-0] a", "[w-1] [b] c", "[w-0] d"]
    logs = {path.name: path.read_text() for path in (tmp_path / "logs" / "new").iterdir()}
    assert logs == {"w-0.log": "a\nd\n" * 2, "w-1.log": "[b] c\n" * 2, "gcloud.log": "Attempting to connect\n" * 2}


@pytest.mark.parametrize(("codes", "expected"), [((75, 4), 4), ((5, 75), 5), ((0, 6), 6), ((7, 8), 7)])
def test_a_slice_that_fails_counts_more_than_one_that_saved(google: Google, codes: tuple[int, int], expected: int):
    ended = google.launch("bash", "-c", f"[[ $HOSTNAME == *-0 ]] && exit {codes[0]}; exit {codes[1]}", SLICES="2")
    assert ended.returncode == expected


def test_slices_that_saved_start_again_once_all_are_ready(google: Google):
    first, second = google.once("exit 75", "exit 0"), google.once("exit 75", "exit 0")
    google.answers(
        ssh_script=f"if [[ $5 == pod-0 ]]; then\n{first}\nelse\n{second}\nfi",
        node=["READY", "REPAIRING", "READY", "READY"],
    )
    assert google.launch("lmjax", SLICES="2").returncode == 0
    assert google.words == [*["ssh"] * 2, *["describe"] * 4, *["ssh"] * 2]


def test_a_signal_is_passed_on_and_the_state_saved(google: Google, tmp_path: Path):
    script = "trap 'echo saved; exit 75' TERM; echo ready; while :; do sleep 0.05; done"
    with google.start("bash", "-c", script, **MADE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "[host-of-pod] ready\n"
        wait_for(tmp_path / "home-pod" / ".lmjax-launch")
        running.send_signal(signal.SIGTERM)
        out, err = running.communicate(timeout=30)
    assert (running.returncode, out) == (75, "[host-of-pod] saved\n")
    assert "TERM: passed on to all hosts" in err
    assert err.splitlines()[-1].startswith("gcloud compute tpus queued-resources delete pod")
    assert sorted(google.words) == ["queued describe", "ssh", "ssh"]


@pytest.mark.parametrize("late", ["", "command=${command//echo \\$! >/sleep 1; echo \\$! >}"])
def test_a_signal_is_heard_however_early_it_comes(google: Google, tmp_path: Path, late: str):
    """Before the command has begun, and before its number is written down."""
    slow = HOST.replace("exec bash", f'command="${{!##--command=}}"; {late or "sleep 1"}; exec bash')
    slow = slow.replace('"${!##--command=}"\n', '"$command"\n')
    google.answers(ssh_script=f'if [[ "${{!#}}" == *"wait "* ]]; then {slow}\nelse {HOST}\nfi')
    script = "trap 'echo saved; exit 75' TERM; touch ran; for ((i = 0; i < 400; i++)); do sleep 0.05; done"
    with google.start("bash", "-c", script) as running:
        wait_for(tmp_path / "home-pod" / "ran" if late else google.log, least=0 if late else 1)
        running.send_signal(signal.SIGTERM)
        out, _ = running.communicate(timeout=30)
    assert running.returncode == 75
    assert ("saved" in out) == bool(late)
    assert (tmp_path / "home-pod" / "ran").exists() == bool(late)
    assert not list((tmp_path / "home-pod").glob(".lmjax-launch"))


def test_a_second_signal_ends_it_at_once(google: Google, tmp_path: Path):
    script = "trap '' TERM; echo ready; while [[ ! -e done ]]; do sleep 0.05; done"
    with google.start("bash", "-c", script) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline() == "[host-of-pod] ready\n"
        running.send_signal(signal.SIGINT)
        assert "INT: passed on" in running.stderr.readline()
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=30) == 128 + signal.SIGINT
        (tmp_path / "home-pod" / "done").touch()
        assert "INT again: the command may still be running on the hosts of pod" in running.stderr.read()


def test_a_signal_while_it_waits_for_the_tpu_ends_it_at_once(google: Google):
    google.answers(queued=["WAITING_FOR_RESOURCES"])
    with google.start("lmjax", **MADE, TPU_POLL_SECONDS="600") as running:
        assert running.stderr is not None
        assert "WAITING_FOR_RESOURCES" in running.stderr.readline()
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=30) == 128 + signal.SIGTERM
        assert "queued-resources delete pod" in running.stderr.read()
    assert google.words == ["queued describe"]


def wait_for(path: Path, least: int = 0) -> None:
    until = time.monotonic() + 30
    while not path.exists() or path.stat().st_size < least:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SETUP": "echo 'a b' && true", "PROJECT": "mine"},
        {"SLICES": "2"},
        MADE,
        MADE | {"SPOT": "1", "SLICES": "2", "SETUP": 'echo "$HOME"'},
    ],
)
def test_a_dry_run_prints_what_a_run_calls(google: Google, tmp_path: Path, variables: dict[str, str]):
    command = ["echo", "it's", "prompts=[a b]", "$HOME", '"']
    google.answers(queued=[ABSENT, "ACTIVE"])
    dry = google.launch(*command, **variables, LOGS=str(tmp_path / "logs"), DRY_RUN="1")
    assert (dry.returncode, dry.stderr, google.calls) == (0, "", [])
    assert not (tmp_path / "logs").exists()
    assert google.launch(*command, **variables).returncode == 0
    printed, called = google.shell_calls(dry.stdout), google.calls
    for call in (*printed, *called):
        call[-1] = re.sub(r"lmjax-stop-[0-9-]+", "lmjax-stop", call[-1])  # each run has a mark of its own
    if "SLICES" in variables:  # which are called at once
        printed, called = sorted(printed), sorted(called)
    assert printed == called


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATOR": "v5litepod-16"}, "ACCELERATOR without RUNTIME: set RUNTIME to a software version"),
        ({"RUNTIME": "v2"}, "RUNTIME and SPOT are for a TPU that is to be made: set ACCELERATOR"),
        ({"SPOT": "1"}, "RUNTIME and SPOT are for a TPU that is to be made: set ACCELERATOR"),
        (MADE | {"SPOT": "yes"}, "SPOT is 'yes': set 1, or leave it out"),
        ({"DRY_RUN": "true"}, "DRY_RUN is 'true': set 1, or leave it out"),
        ({"SLICES": "0"}, "SLICES is '0': how many slices, from 1 on"),
        ({"SLICES": "two"}, "SLICES is 'two': how many slices, from 1 on"),
        ({"TPU_POLL_SECONDS": "soon"}, "TPU_POLL_SECONDS is 'soon': whole seconds, such as 30"),
        ({"LOGS": "/dev/null/logs"}, "LOGS is '/dev/null/logs': choose a directory that can be written to"),
    ],
)
def test_variables_that_make_no_sense_are_refused(google: Google, variables: dict[str, str], message: str):
    ended = google.launch("lmjax", **variables)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"launch/tpu_vm.sh: {message}" in ended.stderr
    assert google.calls == []


@pytest.mark.parametrize(
    ("name", "zone", "message"),
    [
        ("--zone=x", "us-east5-a", "NAME is '--zone=x': lower-case letters, digits and -, such as my-pod"),
        ("Pod", "us-east5-a", "NAME is 'Pod'"),
        ("pod", "lmjax train", "ZONE is 'lmjax train': lower-case letters, digits and -, such as us-east5-a"),
    ],
)
def test_names_that_gcloud_would_misread_are_refused(google: Google, name: str, zone: str, message: str):
    ended = google.run("tpu_vm.sh", name, zone, "lmjax")
    assert ended.returncode == 2
    assert f"launch/tpu_vm.sh: {message}" in ended.stderr
    assert google.calls == []


def test_without_gcloud_it_says_what_is_missing(google: Google):
    (google.directory / "gcloud").unlink()
    ended = google.launch("lmjax", PATH=google.bare_path())
    assert ended.returncode == 2
    assert ended.stderr == (
        "launch/tpu_vm.sh: gcloud is not on PATH: install the Google Cloud CLI, cloud.google.com/sdk\n"
    )


def test_too_few_arguments_say_how_it_is_used(google: Google):
    ended = google.run("tpu_vm.sh", "pod", "zone-a")
    assert ended.returncode == 2
    assert "usage: launch/tpu_vm.sh NAME ZONE COMMAND" in ended.stderr
    assert google.calls == []
