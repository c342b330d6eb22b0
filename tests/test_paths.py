"""Paths of both kinds, what is refused, and a directory whose files are mirrored in a store."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from lmjax import paths
from lmjax.errors import InputError
from tests import object_store


@pytest.mark.fast
@pytest.mark.parametrize(
    ("path", "remote"), [("runs/x", False), ("/runs/x", False), ("s3://bucket/x", True), ("gs://bucket/x", True)]
)
def test_what_is_in_a_store(path, remote):
    assert paths.is_remote(path) is remote
    assert paths.is_remote(epath.Path(path)) is remote


@pytest.mark.fast
def test_a_store_that_is_not_known_is_refused():
    with pytest.raises(InputError, match=r"ftp://host/x: ftp:// is not known; .* s3:// and gs://"):
        paths.as_path("ftp://host/x")


@pytest.mark.fast
@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs")])
def test_a_missing_package_is_refused_by_the_name_of_its_extra(monkeypatch, scheme, extra):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=rf"extra `{extra}`, as in `pip install -e '\.\[{extra}\]'`"):
        paths.as_path(f"{scheme}://bucket/x")
    paths.as_path("on/a/disk")


@pytest.mark.fast
def test_each_directory_in_a_store_has_a_place_of_its_own_on_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path))
    assert paths.working_directory("runs/x") == Path("runs/x")
    one, same, other = (paths.working_directory(f"s3://bucket/{name}") for name in ("x", "x/", "y"))
    assert one == same != other
    assert one.is_relative_to(tmp_path)


@pytest.mark.fast
def test_a_cache_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "file" / "cache"))
    with (
        pytest.raises(InputError, match="the cache of this machine cannot be written .*LMJAX_CACHE"),
        paths.locked("x"),
    ):
        pass


def test_a_large_object_comes_back_as_it_was(bucket, tmp_path):
    content = bytes(range(256)) * (48 << 10)  # more than a part of an upload in parts
    (tmp_path / "file").write_bytes(content)
    target = paths.as_path(f"{bucket}/inner/file")
    paths.upload(tmp_path / "file", target)
    entry = paths.fetch(target, paths.sha256_of(tmp_path / "file"))
    assert entry.read_bytes() == content


def test_only_what_changed_is_copied_and_another_machine_gets_it(bucket, tmp_path, monkeypatch):
    run = f"{bucket}/run"
    mirror = paths.Mirror(run)
    mirror.pull(["metrics.jsonl"])
    (mirror.local / "metrics.jsonl").write_text("1\n")
    (mirror.local / "trace").mkdir()
    (mirror.local / "trace" / "x").write_bytes(b"x")
    (mirror.local / ".hidden").write_bytes(b"x")
    uploaded = []
    upload = paths.upload
    monkeypatch.setattr(paths, "upload", lambda source, to: uploaded.append(source.name) or upload(source, to))
    mirror.push()
    assert uploaded == ["metrics.jsonl", "x"]
    with (mirror.local / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    mirror.push()
    assert uploaded == ["metrics.jsonl", "x", "metrics.jsonl"]
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "another machine"))
    other = paths.Mirror(run)
    assert other.local != mirror.local
    other.pull(["metrics.jsonl", "samples.jsonl"])
    assert (other.local / "metrics.jsonl").read_text() == "1\n2\n"
    assert not (other.local / "samples.jsonl").exists()
    (other.local / "samples.jsonl").write_text("of a run that the store does not have")
    other.pull(["samples.jsonl"])
    assert not (other.local / "samples.jsonl").exists()


@pytest.mark.fast
def test_a_directory_on_a_disk_is_its_own_mirror(tmp_path):
    mirror = paths.Mirror(str(tmp_path))
    (tmp_path / "metrics.jsonl").write_text("1\n")
    mirror.pull(["metrics.jsonl"])
    mirror.push()
    assert mirror.local == tmp_path
    assert (tmp_path / "metrics.jsonl").read_text() == "1\n"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, "Could not connect to the endpoint"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "Unable to locate credentials"),
    ],
    ids=["nothing listens", "no credentials"],
)
def test_a_store_that_cannot_be_reached_ends_a_command_with_2_and_one_message(monkeypatch, changed, says):
    command = [sys.executable, "-c", "from lmjax.cli.main import main; main()", "checkpoint", "list", "s3://bucket/run"]
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # nobody else can listen there, and nobody does
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for name, value in (object_store.environment(address) | changed).items():
            monkeypatch.setenv(name, value)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert says in done.stderr
    assert "AWS_ENDPOINT_URL" in done.stderr
    assert "Traceback" not in done.stderr
