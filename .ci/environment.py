"""Make an environment in a checkout within seconds, from packages that are installed once a machine.

    python3.11 .ci/environment.py .venv

The packages that pyproject.toml names lie in one cached environment outside of any checkout, found by the hash of their
list and of the interpreter. The checkout's own environment is a thin one that sees them and has this checkout installed
in it, editable. It is what ``make env`` would have made, and make takes it for that.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("LMJAX_ENVIRONMENTS", Path.home() / ".cache" / "lmjax" / "environments"))
EXTRAS = ("dev", "tpu")
PROBE = "import jax, flax, pytest, libtpu, hatchling"


def main() -> None:
    venv = Path(sys.argv[1]).absolute()
    ready = venv / ".ready"
    if ready.exists() and ready.stat().st_mtime >= (ROOT / "pyproject.toml").stat().st_mtime:
        print(f"{venv} is ready")
        return
    packages = cached_environment(requirements())
    make_thin(venv, packages)
    ready.touch()
    print(f"{venv} is ready, with the packages of {packages}")


def requirements() -> list[str]:
    """Every requirement of this checkout: to build it, to run it, and those of the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    return wanted + [requirement for extra in EXTRAS for requirement in extras[extra]]


def cached_environment(wanted: list[str]) -> Path:
    """The environment that has ``wanted``, made now if it is missing, was left half-made, or no longer works."""
    key = hashlib.sha256("\n".join([sys.version, sys.executable, *wanted]).encode()).hexdigest()[:16]
    environment = CACHE / f"py{sys.version_info.major}.{sys.version_info.minor}-{key}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{environment.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (environment / ".ready").exists() or not works(environment):
            shutil.rmtree(environment, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", environment], check=True)
            pip(environment, "-qq", *wanted)
            subprocess.run([environment / "bin" / "python", "-c", PROBE], check=True)
            (environment / ".ready").touch()
    return environment


def works(environment: Path) -> bool:
    python = environment / "bin" / "python"
    return python.exists() and subprocess.run([python, "-c", PROBE], check=False).returncode == 0


def make_thin(venv: Path, packages: Path) -> None:
    """Make ``venv``: no packages of its own but this checkout, and the sight of those in ``packages``."""
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").exists():
        sys.exit(f"{venv}: not an environment, and not empty")
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", venv], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    seen = packages / "lib" / version / "site-packages"
    sight = venv / "lib" / version / "site-packages" / "packages.pth"
    sight.write_text(f"import site; site.addsitedir({str(seen)!r})\n")
    pip(venv, "-qq", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))


def pip(environment: Path, *arguments: str) -> None:
    subprocess.run([environment / "bin" / "python", "-m", "pip", "install", *arguments], check=True)


if __name__ == "__main__":
    main()
