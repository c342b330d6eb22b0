"""Every command of docs/ runs as it is written, on a small corpus and with small sizes put behind it."""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from lmjax.cli.run_directory import to_job
from lmjax.config import load
from lmjax.plan.plan import make_plan
from tests.command import lmjax
from tests.launch.stubs import Cluster

ROOT = Path(__file__).parent.parent
PAGES = ("data", "configs", "models", "planning", "launching", "training", "generation")
SMALL = {
    "model.vocab_size": 384,
    "model.max_length": 128,
    "model.embed_dim": 32,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.mlp_dim": 64,
    "data.sequence_length": 64,
    "data.num_workers": 1,
    "data.validation_fraction": 0.2,
    "optimizer.warmup_steps": 1,
    "train.global_batch_size": 8,
    "train.steps": 4,
    "evaluate.every_steps": 4,
    "evaluate.max_rows": 4,
    "evaluate.sample_tokens": 4,
    "checkpoint.every_steps": 4,
    "logging.progress": "lines",
}
"""What an experiment of the docs has in place of its own sizes, so that it takes seconds."""

SYLLABLES = ("token", "mo", "del", "row", "ba", "tch", "lo", "ss")
ACCELERATORS = {"v5p-64": "v5p:2x4x4", "v5litepod-256": "v5e:16x16"}
"""What Google's names of TPUs, in the pages, are to a plan."""
AFTER = {"generation": "training"}
"""A page that goes on where another one ended."""


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    note: str
    """What stands behind the language, such as exit=2."""
    text: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return [Block(*found) for found in re.findall(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)]


def commands(block: Block) -> list[list[str]]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def small(words: list[str]) -> list[str]:
    """A command that takes a config, with the sizes behind it: those that it gives itself stay. Plans take no time."""
    configs = [word for word in words if word.endswith((".yaml", ".gin"))]
    if not configs or "plan" in words[:2]:
        return words
    given = {word.partition("=")[0] for word in words}
    sizes = [f"{key}={value}" for key, value in SMALL.items() if key not in given]
    at = words.index(configs[0]) + 1
    return [*words[:at], *sizes, *words[at:]]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the texts that the pages speak of, where configs/ and launch/ are found."""
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("texts", "chats"):
        (tmp_path / name).mkdir()
    ends = ("", "s", "ed", "ing", "er")
    words = [first + second + end for first in SYLLABLES for second in SYLLABLES for end in ends]
    texts = [" ".join(words[(7 * i + 11 * j) % len(words)] for j in range(20 + i)) + f" {i}." for i in range(30)]
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number:03d}.txt").write_text(text)
    rows = [{"title": f"Chat {number}", "message": {"content": text[::-1]}} for number, text in enumerate(texts)]
    (tmp_path / "chats" / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    (tmp_path / "table.csv").write_text(
        "id,body\n" + "".join(f'{i},"{text.upper()}"\n' for i, text in enumerate(texts))
    )
    (tmp_path / "table.csv.txt").write_text("\n".join(texts))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the "}\n{"prompt": "one row"}\n')
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if page not in AFTER.values()])
def test_every_command_of_a_page_runs(page: str, workplace: Path, capsys: pytest.CaptureFixture[str]):
    for name in [AFTER[page], page] if page in AFTER else [page]:
        assert run(name, workplace, capsys) >= 4


def run(page: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Write the files of a page and run its commands, in order. Returns how many there were."""
    ran = 0
    for block in blocks(page):
        if block.language in ("yaml", "gin"):
            (workplace / block.text.partition("\n")[0].removeprefix("# ")).write_text(block.text)
        for words in commands(block) if block.language == "sh" else ():
            ran += 1
            if block.note in ("launch", "elsewhere"):
                check_config(words)
                continue
            if block.note == "compile":
                words = [word for word in words if word != "--compile"][: words.index("--compile")]
            assert words[0] == "lmjax", words
            code = lmjax(*small(words[1:]))
            output = capsys.readouterr()
            assert code == (2 if block.note == "exit=2" else 0), f"{shlex.join(words)}\n{output.err[-2000:]}"
            assert code == 0 or output.err.startswith("lmjax: ")
    return ran


def check_config(words: list[str]) -> None:
    """Of a command that is not run here, that its config loads, and fits on the devices that it names."""
    at = next(i for i, word in enumerate(words) if word.endswith(".yaml"))
    overrides = [word for word in words[at + 1 :] if "=" in word]
    job = to_job(load(words[at], overrides))
    if topology := named_topology(words[:at]):
        assert make_plan(job, topology).fits is True


def named_topology(words: list[str]) -> str | None:
    """That of a launcher's line. Slurm names no device: an H100."""
    if "--topology" in words:
        return words[words.index("--topology") + 1]
    options = dict(word.split("=", 1) for word in words if "=" in word)
    if name := options.get("ACCELERATOR"):
        return f"{options.get('SLICES', 1)}x{ACCELERATORS[name]}"
    if "sbatch" in words:
        return f"{options['--nodes']}xh100:{options['--gpus-per-node']}"
    return None


@pytest.mark.parametrize("page", ["training", "launching"])
def test_launchers_take_the_commands_of_a_page(page: str, workplace: Path):
    """By a dry run; sbatch hands a script its arguments, and kubectl reads."""
    (workplace / "bin").mkdir()
    cluster = Cluster(workplace / "bin")
    cluster.add("kubectl", "cat >/dev/null")
    cluster.add("sbatch", 'while [[ $1 == -* ]]; do shift; done; exec "$@"')
    path = os.pathsep.join([str(cluster.directory), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "DRY_RUN": "1", "PYTHONPATH": str(ROOT)}
    texts = [block.text for block in blocks(page) if block.note == "launch"]
    assert texts
    for text in texts:
        command = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{text}\n{done.stderr}"
        assert "lmjax train" in done.stdout or "kubectl" in text


@pytest.mark.slow
def test_a_step_of_a_page_compiles(workplace: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("libtpu")
    (page,) = [page for page in PAGES if any(block.note == "compile" for block in blocks(page))]
    run(page, workplace, capsys)
    for block in blocks(page):
        for words in commands(block) if block.note == "compile" else ():
            assert lmjax(*words[1:]) == 0, capsys.readouterr().err[-2000:]


def test_every_page_is_tested():
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} == {*PAGES, "architecture", "conversion"}, (
        "see test_docs_conversion too"
    )
