"""``train.init_from``: training begins with another model's parameters, and a resumed run no longer needs them."""

import json
import shutil

import numpy as np
import pytest
import yaml

from tests.command import lmjax
from tests.convert.tiny_model import write_model
from tests.run.conftest import EXPERIMENT


@pytest.fixture(scope="module")
def source(request, tmp_path_factory):
    rng = np.random.default_rng(request.config.getoption("--seed"))
    shape = EXPERIMENT["model"]  # so that a step which other tests have compiled serves here too
    source = write_model(
        tmp_path_factory.mktemp("source") / "hf",
        rng,
        hidden_size=shape["embed_dim"],
        intermediate_size=shape["mlp_dim"],
        num_key_value_heads=shape["num_heads"],
        rope_theta=10_000.0,
    )
    assert lmjax("convert", "import", str(source), str(source.parent / "imported")) == 0
    return source


@pytest.fixture
def tune(source, dataset, tmp_path):
    """Write the config of a run on this model; its file."""

    def write(name: str, init_from: object, **changes: object) -> str:
        model = yaml.safe_load((source.parent / "imported" / "model.yaml").read_text())["model"]
        train = {**EXPERIMENT["train"], "init_from": None if init_from is None else str(init_from)}
        sections = {"model": {**model, **changes}, "train": train}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**EXPERIMENT, **sections, "data": dataset, "run_dir": str(tmp_path / name)}))
        return str(file)

    return write


def losses(run) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row.get("loss"), row.get("eval_loss")) for row in rows]


def test_every_form_of_a_model_begins_the_same_run(tune, source, tmp_path, capsys):
    assert lmjax("train", tune("first", source)) == 0
    assert f"training from {source}" in capsys.readouterr().out
    assert lmjax("train", tune("second", source.parent / "imported")) == 0
    assert lmjax("train", tune("third", None)) == 0
    first, second, third = (losses(tmp_path / name) for name in ("first", "second", "third"))
    assert first == second
    assert first[0] != third[0], "random parameters score otherwise"
    capsys.readouterr()
    assert lmjax("convert", "export", str(tmp_path / "first"), str(tmp_path / "out")) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"starting from {source}" in card
    assert f"{first[-1][2]:.4f}" in card, "the last evaluation"
    assert lmjax("convert", "check", str(tmp_path / "first"), str(tmp_path / "out")) == 0
    assert lmjax("convert", "check", str(source), str(tmp_path / "out")) == 2, "it was trained"


def test_a_resumed_run_does_not_look_at_the_model_again(tune, source, tmp_path):
    gone = shutil.copytree(source, tmp_path / "gone")
    file = tune("run", gone)
    assert lmjax("train", file) == 0
    whole = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    shutil.rmtree(gone)
    assert lmjax("train", file) == 0
    assert losses(tmp_path / "run") == whole


def test_a_longest_row_may_differ_and_nothing_else(tune, source, tmp_path, capsys):
    assert lmjax("train", tune("longer", source, max_length=128)) == 0
    capsys.readouterr()
    assert lmjax("train", tune("other", source, rope_theta=50.0, mlp_dim=32)) == 2
    said = capsys.readouterr().err
    assert "model.rope_theta: 10000.0 there, 50.0 in the config" in said
    assert "model.mlp_dim: 64 there, 32 in the config" in said
    assert not (tmp_path / "other" / "metrics.jsonl").exists()
    assert lmjax("train", tune("nowhere", tmp_path / "missing")) == 2
    assert "no such file or directory" in capsys.readouterr().err
