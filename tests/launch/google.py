"""Google Cloud for launch/tpu_vm.sh: a stub of gcloud with TPUs whose states and hosts a test decides on."""

import functools
import signal
import subprocess
from pathlib import Path

from tests.launch.stubs import Cluster

HOST = """
home="$(dirname "$0")/home-$5"
mkdir -p "$home" && cd "$home" && HOSTNAME="host-of-$5" exec bash -c "${!##--command=}"
"""
"""What ssh does: the command, in a home directory that each slice here has for all of its hosts."""

MADE = {"ACCELERATOR": "v5litepod-16", "RUNTIME": "v2-alpha-tpuv5-lite"}

ABSENT = "echo 'ERROR: (gcloud.compute.tpus.describe) NOT_FOUND: no such resource' >&2; exit 1"
DENIED = "echo 'ERROR: (gcloud.compute.tpus.describe) PERMISSION_DENIED: not yours' >&2; exit 1"


class Google(Cluster):
    """A stub of gcloud, by default one on which all goes well with a TPU that is there."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.answers()

    def answers(
        self,
        *,
        ssh: list[str] | None = None,
        ssh_script: str = HOST,
        queued: list[str] | None = None,
        node: list[str] | None = None,
        create: str = "exit 0",
        delete: str = "exit 0",
    ) -> None:
        """What each call of these does, in turn: a script, or a state in capitals that it tells."""

        def turn(scripts: list[str] | None, always: str) -> str:
            if scripts is None:
                return always
            return self.once(*(f"echo {script}" if script.isupper() else script for script in scripts))

        self.add(
            "gcloud",
            f"""
case $3/$4 in
tpu-vm/ssh) {turn(ssh, ssh_script)} ;;
tpu-vm/describe) {turn(node, "echo READY")} ;;
queued-resources/describe) {turn(queued, "echo ACTIVE")} ;;
queued-resources/create) {create} ;;
queued-resources/delete) {delete} ;;
*) exit 98 ;;
esac
""",
        )

    def launch(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run("tpu_vm.sh", "pod", "zone-a", *command, **{"TPU_POLL_SECONDS": "0"} | variables)

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        arguments, environment = self.command("tpu_vm.sh", "pod", "zone-a", *command, **variables)
        pipe = subprocess.PIPE
        # A shell starts what it runs in the background with INT ignored, which no trap can take back.
        heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(arguments, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=heard)

    @property
    def words(self) -> list[str]:
        """What was called, in short."""
        return [call[4] if call[3] == "tpu-vm" else f"queued {call[4]}" for call in self.calls]

    @property
    def commands(self) -> list[str]:
        """Of the calls of ssh."""
        return [call[-1].removeprefix("--command=") for call in self.calls if call[4] == "ssh"]
