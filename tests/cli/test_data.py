"""``lmjax data`` and ``lmjax tokenizer``: from text files to a dataset that can be looked at."""

import json

import pytest

from lmjax.cli import data, tokenizer
from lmjax.data.index import read_index
from lmjax.errors import InputError
from tests.command import lmjax

CONFIG = """
run_dir: {root}/run
model: {{vocab_size: 259, max_length: 64, embed_dim: 8, num_layers: 1, num_heads: 1, mlp_dim: 8}}
tokenizer: {{kind: bytes}}
data:
  path: {root}/dataset
  sources: [{{kind: files, path: {root}/texts}}]
  sequence_length: 64
  validation_fraction: 0.2
  num_workers: 1
train: {{steps: 1, global_batch_size: 2}}
"""


@pytest.fixture
def config(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        words = " ".join("".join(chr(97 + (number * k + other) % 26) for k in range(5)) for other in range(number))
        (texts / f"{number:02d}.txt").write_text(f"text {number}\n{words}\n")
    file = tmp_path / "experiment.yaml"
    file.write_text(CONFIG.format(root=tmp_path))
    return str(file)


def test_prepare_then_inspect(config, tmp_path, capsys):
    data.prepare(config)
    directory = str(tmp_path / "dataset")
    index = read_index(directory)
    assert sum(shard.documents for shard in index.shards) == 40
    capsys.readouterr()

    data.inspect(config, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["directory"] == directory
    assert {row["split"]: row["tokens"] for row in found["splits"]} == {
        split: sum(shard.tokens for shard in index.shards if shard.split == split) for split in ("train", "validation")
    }
    assert {(row["split"], row["packing"]) for row in found["packing"]} == {
        (split, packing) for split in ("train", "validation") for packing in ("best_fit", "concat")
    }
    assert {row["sequence_length"] for row in found["packing"]} == {64}
    for row in found["packing"]:
        tokens = row["rows"] * 64 - row["padding"]
        assert tokens == next(split["tokens"] for split in found["splits"] if split["split"] == row["split"])
    assert len(found["samples"]) == 2
    for row in found["samples"]:
        for piece in row:
            assert (piece["start"] == 0) == piece["text"].startswith("text ")

    data.inspect(directory, as_json=True)
    assert json.loads(capsys.readouterr().out) == found, "a dataset's directory tells what its config does"
    data.inspect(directory, sequence_length=32, samples=0, as_json=True)
    other = json.loads(capsys.readouterr().out)
    assert {row["sequence_length"] for row in other["packing"]} == {32}
    assert other["samples"] == []

    data.inspect(config, ["data.packing=concat"], samples=1)
    shown = capsys.readouterr().out
    for part in ("Documents, tokens each", "best_fit", "concat", "--- document ", "tokens 0 to "):
        assert part in shown


def test_prepare_again_says_that_it_is_done_and_changes_nothing(config, tmp_path, capsys):
    data.prepare(config)
    before = {file.name: file.read_bytes() for file in (tmp_path / "dataset").iterdir()}
    capsys.readouterr()
    data.prepare(config)
    assert "already prepared" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (tmp_path / "dataset").iterdir()} == before


@pytest.mark.fast
def test_inspect_refuses_what_would_have_no_effect_or_has_no_dataset(config, tmp_path):
    with pytest.raises(InputError, match="apply to a config"):
        data.inspect(str(tmp_path), ["data.packing=concat"])
    with pytest.raises(InputError, match="no prepared dataset"):
        data.inspect(str(tmp_path))
    with pytest.raises(InputError, match="no prepared dataset"):
        data.inspect(config)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("kind: csv, path: {}/a.csv", "a.csv has no column 'text'; it has 'id', 'body'"),
        ("kind: csv, path: {}/a.csv.gz, text_field: body", "a.csv.gz is a broken gzip archive"),
        ("kind: parquet, path: {}/a.csv", "a.csv is no Parquet file"),
    ],
)
def test_a_source_that_is_not_what_it_is_said_to_be_ends_with_code_2_and_one_message(
    config, tmp_path, capsys, source, message
):
    (tmp_path / "a.csv").write_text("id,body\n1,words\n")
    (tmp_path / "a.csv.gz").write_text("no archive")
    assert lmjax("data", "prepare", config, f"data.sources=[{{{source.format(tmp_path)}}}]") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "dataset" / "index.json").exists()


def test_a_tokenizer_is_trained_to_a_file_that_prepare_takes(config, tmp_path, capsys):
    model = tmp_path / "words.model"
    training = ["tokenizer={kind: sentencepiece, vocab_size: 300, sample_bytes: 100000}", "model.vocab_size=300"]
    tokenizer.train(config, training, output=str(model))
    assert "300 tokens" in capsys.readouterr().out
    before = model.read_bytes()
    with pytest.raises(InputError, match=r"words\.model"):
        tokenizer.train(config, training, output=str(model))
    assert model.read_bytes() == before, "what is there is not overwritten"
    data.prepare(config, [f"tokenizer={{kind: sentencepiece_file, path: {model}}}", "model.vocab_size=300"])
    assert read_index(str(tmp_path / "dataset")).tokenizer.vocab_size == 300
