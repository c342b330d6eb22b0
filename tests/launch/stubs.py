"""Commands of a cluster that are not here, as shell scripts on PATH that write down how they were called."""

import os
import subprocess
from pathlib import Path

LAUNCH = Path(__file__).parents[2] / "launch"


class Cluster:
    """Stubs in a directory that stands first on PATH. Each call is a line of its name and arguments."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.log = directory / "calls"
        self.log.touch()
        self.counters = 0

    def add(self, name: str, script: str) -> None:
        """A command ``name`` that is recorded and then runs ``script`` with its own arguments."""
        path = self.directory / name
        record = f'printf "%s|" {name} "$@" >>"{self.log}"; echo >>"{self.log}"'
        path.write_text(f"#!/usr/bin/env bash\n{record}\n{script}\n")
        path.chmod(0o755)

    def once(self, *answers: str) -> str:
        """Script that runs the first of ``answers`` at its first call, the next one at the next, and so on."""
        self.counters += 1
        number = self.directory / f"counter-{self.counters}"
        cases = "\n".join(f"{index}) {answer} ;;" for index, answer in enumerate(answers))
        count = f'n=$(cat "{number}" 2>/dev/null || echo 0); echo $((n + 1)) >"{number}"'
        return f"{count}\ncase $n in\n{cases}\n*) exit 99 ;;\nesac"

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        path = {"PATH": f"{self.directory}{os.pathsep}{os.environ['PATH']}"}
        command = [str(LAUNCH / script), *arguments]
        return subprocess.run(
            command, env=os.environ | path | variables, capture_output=True, text=True, check=False, timeout=60
        )

    @property
    def calls(self) -> list[list[str]]:
        return [line.rstrip("|").split("|") for line in self.log.read_text().splitlines()]
