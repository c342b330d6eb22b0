"""The config of a real run: its sections, its files, and that it loads back to itself."""

import dataclasses
from pathlib import Path

import pytest

from lmjax.config import RunConfig, dump, load, load_model
from lmjax.config.resume import MAY_CHANGE, check_resume
from lmjax.errors import InputError
from lmjax.models.decoder import DecoderConfig

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
MODEL = str(ROOT / "configs" / "models" / "llama3_8b.yaml")

pytestmark = pytest.mark.fast


def test_the_sections_are_those_of_the_contract():
    sections = "model tokenizer data mesh precision optimizer train checkpoint evaluate logging run_dir"
    assert {field.name for field in dataclasses.fields(RunConfig)} == set(sections.split())  # pyright: ignore
    assert {key.partition(".")[0] for key in MAY_CHANGE} < set(sections.split())


def test_what_another_mesh_may_need_may_change_on_resume():
    needed = ["train.attention_kernel=reference", "train.expert_exchange=gather", "train.remat.policy=full"]
    config = load(QUICKSTART)
    check_resume(config, load(QUICKSTART, ["mesh.fsdp=2", *needed]), "runs/x")
    with pytest.raises(InputError, match=r"train\.z_loss: the run has 0\.0, the config 0\.1"):
        check_resume(config, load(QUICKSTART, [*needed, "train.z_loss=0.1"]), "runs/x")


def test_a_resolved_config_loads_back_to_itself(tmp_path):
    config = load(QUICKSTART, ["optimizer.learning_rate=3e-4", "mesh.tensor=2", "run_dir='runs/\\${x}'"])
    assert config.optimizer.learning_rate == 3e-4
    assert config.run_dir == "runs/${x}"
    dump(config, str(tmp_path / "config.yaml"))
    assert load(str(tmp_path / "config.yaml")) == config
    assert load(str(tmp_path / "config.yaml"), ["mesh.tensor=4"]) != config


def test_a_tilde_is_the_home_directory_in_every_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    sources = "data.sources=[{kind: files, path: ~/texts}, {kind: jsonl, path: '~/*.jsonl'}]"
    tokenizer = "tokenizer={kind: sentencepiece_file, path: ~/my.model}"
    config = load(QUICKSTART, ["run_dir=~/runs/a", "data.path=~/data~", sources, tokenizer])
    assert (config.run_dir, config.data.path) == ("/home/someone/runs/a", "/home/someone/data~")
    paths = [getattr(owner, "path", "") for owner in (*config.data.sources, config.tokenizer)]
    assert paths == ["/home/someone/texts", "/home/someone/*.jsonl", "/home/someone/my.model"]


def test_an_experiment_composes_an_architecture(tmp_path):
    top = tmp_path / "top.yaml"
    top.write_text(f"base: [{QUICKSTART}, {MODEL}]\ndata: {{sequence_length: 128}}\nmodel: {{num_layers: 2}}")
    config = load(str(top))
    assert config.model == dataclasses.replace(load_model(MODEL), num_layers=2, tie_embeddings=True)
    assert config.data.sequence_length == 128


def test_an_architecture_alone_is_no_experiment_and_the_other_way_round():
    assert isinstance(load_model(MODEL), DecoderConfig)
    with pytest.raises(InputError, match=r"llama3_8b\.yaml: train is missing"):
        load(MODEL)
    with pytest.raises(InputError, match=r"quickstart\.yaml: train: unknown key"):
        load_model(QUICKSTART)


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("model.num_head=4", "did you mean model.num_heads?"),
        ("learning_rate=1e-3", "did you mean optimizer.learning_rate?"),
        ("train.steps=many", "train.steps: found 'many', allowed: a whole number"),
        ("train.steps=0", "train.steps is 0; it has to be 1 or more"),
        ("tokenizer.kind=sentencepeice", "did you mean sentencepiece?"),
        ("precision.compute=bf16", "precision.compute: found 'bf16', allowed: 'bfloat16' or 'float32'"),
        ("data.sources=[]", "data.sources is empty"),
        ("model.num_heads=7", "embed_dim"),
        ("checkpoint.every_steps=0", "checkpoint.every_steps is 0"),
        ("run_dir=''", "run_dir is empty"),
        ("evaluate.max_rows=0", "evaluate.max_rows is 0; it has to be 1 or more"),
        ("train.z_loss=-1.0", "train.z_loss is -1.0; it has to be 0 or more"),
        ("train.seed=4294967296", "train.seed is 4294967296; it has to be at least 0 and below 2^32"),
    ],
)
def test_a_wrong_value_of_a_run_is_explained(override, answer):
    with pytest.raises(InputError) as caught:
        load(QUICKSTART, [override])
    message = str(caught.value)
    assert message.startswith(f"override {override}: ") or override == "model.num_heads=7"
    assert answer in message
    assert message.count("checkpoint.") < 3
