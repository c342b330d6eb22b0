"""Commands of a cluster that are not here, as shell scripts on PATH that write down how they were called."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

LAUNCH = Path(__file__).parents[2] / "launch"

VARIABLES = {
    *("ACCELERATOR", "RUNTIME", "SPOT", "SLICES", "PROJECT", "SETUP", "LOGS", "TPU_POLL_SECONDS"),
    *("VENV", "CONTAINER", "CONTAINER_MOUNTS", "SLURM_JOB_ID", "DRY_RUN"),
    *("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"),
}
"""What the scripts look at: whoever runs the tests may have some of them set."""


class Cluster:
    """Stubs in a directory that stands first on PATH. Each call is written down with its name and arguments."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.log = directory / "calls"
        self.log.touch()
        self.counters = 0

    def add(self, name: str, script: str) -> None:
        """A command ``name`` that is recorded and then runs ``script`` with its own arguments."""
        path = self.directory / name
        record = rf"""printf -v call '%s\x1f' {name} "$@"; printf '%s\x1e' "$call" >>"{self.log}" """
        path.write_text(f"#!/usr/bin/env bash\n{record}\n{script}\n")
        path.chmod(0o755)

    def once(self, *answers: str) -> str:
        """Script that runs the first of ``answers`` at its first call, the next one at the next, and so on."""
        self.counters += 1
        number = self.directory / f"counter-{self.counters}"
        cases = "\n".join(f"{index}) {answer} ;;" for index, answer in enumerate(answers))
        count = f'n=$(cat "{number}" 2>/dev/null || echo 0); echo $((n + 1)) >"{number}"'
        return f"{count}\ncase $n in\n{cases}\n*) exit 99 ;;\nesac"

    def command(self, script: str, *arguments: str, **variables: str) -> tuple[list[str], dict[str, str]]:
        """How ``script`` is started, and its environment."""
        inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        path = {"PATH": f"{self.directory}{os.pathsep}{os.environ['PATH']}"}
        return [str(LAUNCH / script), *arguments], inherited | path | variables

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command, environment = self.command(script, *arguments, **variables)
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    def bare_path(self) -> str:
        """A PATH with the ordinary programs that the scripts use, and no command of a cluster but the stubs."""
        programs = self.directory / "programs"
        programs.mkdir()
        for name in ("bash", "cat", "env", "grep", "mkdir", "mktemp", "rm", "sed", "sleep"):
            found = shutil.which(name)
            assert found is not None, name
            (programs / name).symlink_to(found)
        return f"{self.directory}{os.pathsep}{programs}"

    @property
    def calls(self) -> list[list[str]]:
        return [call.split("\x1f")[:-1] for call in self.log.read_text().split("\x1e")[:-1]]

    def shell_calls(self, commands: str) -> list[list[str]]:
        """The calls that a shell makes of ``commands``, as a dry run prints them; nothing else happens."""
        recorder = Cluster(Path(tempfile.mkdtemp(dir=self.directory)))
        for name in ("gcloud", "srun", "scontrol"):
            recorder.add(name, "exit 0")
        environment = os.environ | {"PATH": f"{recorder.directory}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run(["bash", "-euc", commands], env=environment, check=True, timeout=60)
        assert len(recorder.calls) == len(commands.splitlines())
        return recorder.calls
