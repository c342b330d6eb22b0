"""A run's directory in an object store: recorded, gone on with by another machine, refused to another experiment."""

import dataclasses

import pytest
from etils import epath

from lmjax import paths
from lmjax.cli.run_directory import opened_run
from lmjax.config import RunConfig, load
from lmjax.data.config import DataConfig, FilesSource
from lmjax.data.tokenizer import BytesTokenizer
from lmjax.errors import InputError
from lmjax.train.config import TrainConfig
from tests import tiny


@pytest.fixture
def config(bucket):
    return RunConfig(
        run_dir=f"{bucket}/run",
        model=tiny.CONFIG,
        tokenizer=BytesTokenizer(kind="bytes"),
        data=DataConfig(path=f"{bucket}/data", sources=(FilesSource(path="texts"),), sequence_length=32),
        train=TrainConfig(steps=4, global_batch_size=4),
    )


def test_the_run_is_in_the_store_and_goes_on_on_another_machine(config, tmp_path, monkeypatch):
    store = epath.Path(config.run_dir)
    with opened_run(config) as mirror:
        assert load(str(store / "config.yaml")) == config
        (mirror.local / "metrics.jsonl").write_text("1\n")
        mirror.push()
        assert (store / "metrics.jsonl").read_text() == "1\n"
        (mirror.local / "report.html").write_text("report")
    assert (store / "report.html").read_text() == "report"
    monkeypatch.setenv("LMJAX_CACHE", str(tmp_path / "another machine"))
    with opened_run(config) as mirror:
        assert (mirror.local / "metrics.jsonl").read_text() == "1\n"
    other = dataclasses.replace(config, train=TrainConfig(steps=4, global_batch_size=8))
    with pytest.raises(InputError, match="was made with another config"), opened_run(other):
        pass


def test_a_run_that_has_not_begun_may_become_another(config):
    with opened_run(config):
        pass
    other = dataclasses.replace(config, train=TrainConfig(steps=4, global_batch_size=8))
    with opened_run(other):
        pass
    assert load(f"{config.run_dir}/config.yaml") == other


def test_what_ends_the_run_is_in_its_log(config):
    def fail(mirror: paths.Mirror) -> None:
        (mirror.local / "log.txt").write_text("the end\n")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), opened_run(config) as mirror:
        fail(mirror)
    assert epath.Path(config.run_dir, "log.txt").read_text() == "the end\n"


def test_a_place_with_something_else_is_refused(config):
    (epath.Path(config.run_dir) / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="not empty and has no config.yaml"), opened_run(config):
        pass


def test_two_trainings_on_one_machine_are_kept_apart(config):
    with opened_run(config):
        with pytest.raises(InputError, match="another process trains this run now"), opened_run(config):
            pass
        assert paths.working_directory(config.run_dir).is_dir()
