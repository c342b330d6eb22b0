"""What README.md shows can be done as it is written, on the machine that it says."""

import re
import shlex
from pathlib import Path

import pytest

from lmjax.config import load
from lmjax.errors import InputError
from lmjax.mesh import make_mesh
from lmjax.train.job import check_shapes
from lmjax.train.state import make_blueprint

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

pytestmark = pytest.mark.fast


def train_commands() -> list[list[str]]:
    """The overrides of every `lmjax train my.yaml` in the README."""
    lines = re.findall(r"^    .*lmjax train my\.yaml(.*)$", README, re.MULTILINE)
    return [[word for word in shlex.split(line, comments=True) if "=" in word] for line in lines]


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The README's experiment, where its base is found."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "my.yaml").write_text(block)
    monkeypatch.chdir(tmp_path)
    return "my.yaml"


def test_every_train_command_fits_eight_devices(experiment: str):
    assert len(train_commands()) >= 4
    for overrides in train_commands():
        config = load(experiment, overrides)
        mesh = make_mesh(config.mesh)
        check_shapes(config, mesh)  # pyright: ignore[reportArgumentType]
        make_blueprint(config.model, config.optimizer, config.train.steps, mesh)
    odd = load(experiment, ["model.num_heads=5", "mesh.fsdp=4", "mesh.tensor=2"])
    with pytest.raises(InputError, match="5 mod 2"):
        make_blueprint(odd.model, odd.optimizer, odd.train.steps, make_mesh(odd.mesh))


def test_every_file_of_the_tree_is_there():
    tree = README.partition("## The tree\n")[2].partition("\n## ")[0]
    above, names = tree.split("    lmjax/\n")
    listed = re.findall(r"^    (\S+)", above, re.MULTILINE)
    listed += [f"lmjax/{name}" for name in re.findall(r"(?:^ {6}| {2})(\w+(?:\.py|/)) ", names, re.MULTILINE)]
    assert len(listed) > 15
    assert [name for name in listed if not (ROOT / name).exists()] == []
    there = {path.name for path in (ROOT / "lmjax").iterdir() if not path.name.startswith("__")}
    assert {name.strip("/").partition("/")[2] for name in listed if name.startswith("lmjax/")} == there
