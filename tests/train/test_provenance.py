"""run.json: one entry a start, and a commit that is lmjax's own."""

import json
import subprocess
from pathlib import Path

import jax
import pytest

from lmjax.errors import InputError
from lmjax.train.provenance import commit_of, read, record_start, versions

pytestmark = pytest.mark.fast


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(directory), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_each_start_is_appended_and_the_id_stays(tmp_path: Path):
    assert read(tmp_path) is None
    identity = record_start(tmp_path, 0, "f00")
    assert record_start(tmp_path, 7, "f00") == identity
    record = json.loads((tmp_path / "run.json").read_text())
    assert record == read(tmp_path)
    assert [start["step"] for start in record["starts"]] == [0, 7]
    start = record["starts"][-1]
    assert start["versions"] == versions()
    assert start["versions"]["jax"] == jax.__version__
    assert start["devices"] == [{"platform": "cpu", "kind": "cpu", "count": 8}]
    assert (start["dataset"], start["processes"]) == ("f00", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_the_commit_is_that_of_the_package_and_changes_are_told(tmp_path: Path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert commit_of(package) is None, "no repository"
    git(tmp_path, "init", "-q")
    assert commit_of(package) is None, "a repository that does not track the package"
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit_of(package) == (head, False)
    (package / "new.py").write_text("")
    assert commit_of(package) == (head, True)


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(tmp_path) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"id": 3, "starts": []}', '{"id": "a"}'])
def test_a_broken_record_is_refused(tmp_path: Path, content: str):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match="not the record of a run"):
        record_start(tmp_path, 0, "f00")
    assert (tmp_path / "run.json").read_text() == content
