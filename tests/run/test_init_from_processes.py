"""``train.init_from`` in several processes begins the run that it begins in one."""

from pathlib import Path

import pytest

from tests.command import lmjax
from tests.run.test_init_from import source as source  # the fixtures are that module's
from tests.run.test_init_from import tune as tune
from tests.run.test_processes import launch, train_rows

OVERRIDES = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.steps=3", "checkpoint.every_steps=3")


@pytest.mark.slow
def test_two_processes_of_four_devices_begin_as_one_of_eight(tune, source, tmp_path: Path):
    imported = source.parent / "imported"
    assert lmjax("train", tune("one", imported), *OVERRIDES) == 0
    one = train_rows(tmp_path / "one")
    assert [row["step"] for row in one] == [1, 2, 3]
    for name, model in (("imported", imported), ("huggingface", source)):
        ended = launch(2, 4, "train", tune(name, model), *OVERRIDES)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        two = train_rows(tmp_path / name)
        assert [row["batch_hash"] for row in two] == [row["batch_hash"] for row in one]
        assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-6)

    assert lmjax("train", tune("random", None), *OVERRIDES) == 0
    random = train_rows(tmp_path / "random")
    assert random[0]["batch_hash"] == one[0]["batch_hash"]
    assert random[0]["loss"] != pytest.approx(one[0]["loss"], rel=1e-2), "its parameters are others"
