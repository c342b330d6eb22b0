"""What is wrong with a run's input ends it with exit code 2 and one message, and nothing is overwritten."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmjax.cli.run_directory import opened_run
from lmjax.config import load
from lmjax.data.index import fingerprint, read_index
from lmjax.errors import InputError
from lmjax.train import loop
from tests.command import lmjax

Experiment = Callable[..., str]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one message of a command that exits 2."""
    capsys.readouterr()
    assert lmjax(*arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("lmjax: ")
    assert "Traceback" not in message
    return message


EXPERTS = "model.moe.num_experts=8 model.moe.experts_per_token=2"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stepz=3", "train.steps"),
        ("train.steps=many", "a whole number"),
        ("train.steps=true", "a whole number"),
        ("train.steps", "train.steps"),
        ("mesh.data=3", "3"),
        ("mesh.data=16", "16"),
        ("train.global_batch_size=9", "9 mod 8 = 1"),
        ("model.vocab_size=100", "259"),
        ("model.num_heads=5", "32 mod 5"),
        ("data.sequence_length=65", "model.max_length"),
        ("train.remat.policy=most", "attention"),
        ("train.remat.save=[query]", "policy save"),
        ("precision.gradient_reduction=float32", "changes nothing"),
        ("train.attention_kernel=splash", "runs on tpu only, not on cpu"),
        ("train.attention_kernel=flash_tpu", "tpu v6e only, not on cpu"),
        ("train.attention_kernel=flash_hopper", "runs on gpu hopper only, not on cpu"),
        ("train.attention_kernel=cudnn", "does not have segments"),
        ("train.attention_kernel=flash", "auto"),
        (EXPERTS.replace("=2", "=9"), "a token cannot go through more experts than there are"),
        (f"{EXPERTS} model.moe.groups=3", "8 mod 3 = 2"),
        (f"{EXPERTS} model.moe.capacity_factor=0.01", "room for less than one token"),
        (
            f"{EXPERTS} model.moe.balance_over=batch train.accumulation=2 train.global_batch_size=16",
            "balance_over=sequence or accumulation=1",
        ),
        (f"{EXPERTS} model.moe.num_experts=6 mesh.expert=4 mesh.fsdp=2", "6 mod 4 = 2"),
        ("mesh.expert=2 mesh.fsdp=4", "the model has no experts"),
        ("train.expert_exchange=ragged", "has no effect"),
        (f"{EXPERTS} train.expert_exchange=gather", "on a mesh that splits them"),
        (
            f"{EXPERTS} train.expert_exchange=ragged model.moe.capacity_factor=2 mesh.expert=2 mesh.fsdp=4",
            "without a capacity_factor",
        ),
        ("evaluate.temperature=1.0", "prompts"),
        ("optimizer.schedule=constant optimizer.end_fraction=0.5", "cosine"),
        ("data.path=/nowhere/at/all", "lmjax data prepare"),
    ],
)
def test_a_config_that_cannot_be_is_refused_before_anything_is_written(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, said: str
):
    message = refused(capsys, "train", experiment("run"), *override.split(" "))
    assert said in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_model_whose_heads_tensor_does_not_divide_is_refused_with_the_arithmetic(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
):
    assert "4 mod 8 = 4" in refused(capsys, "train", experiment("run"), "mesh.fsdp=1", "mesh.tensor=8")


def test_a_run_directory_of_another_experiment_is_refused_and_left_alone(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    run.mkdir()
    (run / "thesis.txt").write_text("mine")
    assert "not a run" in refused(capsys, "train", experiment("run"))
    assert [path.name for path in run.iterdir()] == ["thesis.txt"]
    (run / "thesis.txt").unlink()
    assert lmjax("train", experiment("run", train={"steps": 1})) == 0
    before = (run / "config.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes()
    message = refused(capsys, "train", experiment("run", train={"seed": 5}, optimizer={"beta2": 0.9}))
    assert "train.seed" in message
    assert "optimizer.beta2" in message
    assert "train.steps" in message.splitlines()[-1], "what may change is said"
    assert ((run / "config.yaml").read_bytes(), (run / "metrics.jsonl").read_bytes()) == before


def test_a_run_that_was_refused_before_it_began_takes_the_repaired_config(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert "lmjax data prepare" in refused(capsys, "train", experiment("run"), f"data.path={tmp_path}/misspelt")
    assert lmjax("train", experiment("run", train={"steps": 1})) == 0
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    assert "lmjax data prepare" in refused(capsys, "train", experiment("run"), f"data.path={tmp_path}/misspelt")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_run_directory_that_was_moved_goes_on(experiment: Experiment, tmp_path: Path):
    assert lmjax("train", experiment("run", train={"steps": 1})) == 0
    moved = (tmp_path / "run").rename(tmp_path / "moved ${1}")
    assert lmjax("train", experiment("run", train={"steps": 1}), f"run_dir='{tmp_path}/moved \\${{1}}'") == 0
    assert sorted(path.name for path in (moved / "checkpoints").iterdir()) == ["1"]
    assert not (tmp_path / "run").exists()


def test_prompts_that_leave_no_room_are_refused_before_a_run_goes_on(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert lmjax("train", experiment("run", train={"steps": 1})) == 0
    capsys.readouterr()
    longer = experiment("run", train={"steps": 3}, evaluate={"prompts": ["one"], "sample_tokens": 64})
    assert "Ask for at most 60" in refused(capsys, "train", longer)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 3, "two evaluations and one update: nothing was trained in between"


def test_a_dataset_without_held_out_documents_is_told_and_trains(
    experiment: Experiment, dataset: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    section = {**dataset, "path": str(tmp_path / "all"), "validation_fraction": 0.0, "num_workers": 1}
    file = experiment("run", data=section, train={"steps": 1})
    assert lmjax("data", "prepare", file) == 0
    assert lmjax("train", file) == 0
    assert "holds no document out, so no loss is evaluated" in capsys.readouterr().out
    assert "--text" in refused(capsys, "evaluate", str(tmp_path / "run"))


def test_a_run_that_another_process_trains_is_refused_and_left_alone(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = experiment("run")
    with opened_run(load(file)):
        before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        assert "another process trains this run" in refused(capsys, "train", file)
        assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert lmjax("train", file, "train.steps=1") == 0, "the lock is gone with its holder"


def test_no_permission_to_write_is_one_message(
    experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("in the way")
    message = refused(capsys, "train", experiment("run"), f"run_dir={tmp_path}/file/run")
    assert str(tmp_path / "file") in message


@pytest.fixture
def damaged(dataset: dict, tmp_path: Path) -> Path:
    """A copy of the dataset to damage."""
    return Path(shutil.copytree(dataset["path"], tmp_path / "damaged"))


def test_a_corrupt_or_missing_shard_is_named(experiment: Experiment, damaged: Path, capsys: pytest.CaptureFixture[str]):
    shard = next(damaged.glob("train-*.arrayrecord"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert shard.name in refused(capsys, "train", experiment("run"), f"data.path={damaged}")
    shard.unlink()
    assert shard.name in refused(capsys, "train", experiment("run"), f"data.path={damaged}")


def test_a_corrupt_plan_is_named(experiment: Experiment, damaged: Path, capsys: pytest.CaptureFixture[str]):
    plan = next(damaged.glob("plan-train-*pieces.npy"))
    content = bytearray(plan.read_bytes())
    content[-1] ^= 1
    plan.write_bytes(content)
    assert plan.name in refused(capsys, "train", experiment("run"), f"data.path={damaged}")


def test_a_dataset_of_another_tokenizer_is_refused(experiment: Experiment, capsys: pytest.CaptureFixture[str]):
    message = refused(
        capsys, "train", experiment("run"), "tokenizer={kind: sentencepiece, vocab_size: 300}", "model.vocab_size=300"
    )
    assert "tokenizer" in message


def test_a_checkpoint_of_another_dataset_is_refused(dataset: dict):
    there = SimpleNamespace(directory=dataset["path"], index=read_index(dataset["path"]))
    checkpoint = Path("run/checkpoints/2")
    loop.check_same_data({"dataset": fingerprint(there.index)}, there, checkpoint)  # pyright: ignore
    with pytest.raises(InputError, match="trained on the dataset 0000"):
        loop.check_same_data({"dataset": "0" * 64}, there, checkpoint)  # pyright: ignore
