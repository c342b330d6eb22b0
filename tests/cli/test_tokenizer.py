"""``lmjax tokenizer report`` measures the tokenizer of a config, a dataset or a file, and says what it cannot."""

import json

import pytest

from lmjax.cli import data, tokenizer
from lmjax.errors import InputError
from tests.command import lmjax
from tests.data.tiny_tokenizers import content_of

CONFIG = """
run_dir: {root}/run
model: {{vocab_size: 400, max_length: 64, embed_dim: 8, num_layers: 1, num_heads: 1, mlp_dim: 8}}
tokenizer: {{kind: bytes}}
data:
  path: {root}/dataset
  sources: [{{kind: files, path: {root}/texts}}]
  sequence_length: 64
  validation_fraction: 0.0
  num_workers: 1
train: {{steps: 1, global_batch_size: 2}}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"the fox and the café {number}\n")
    file = tmp_path / "experiment.yaml"
    file.write_text(CONFIG.format(root=tmp_path))
    return str(file)


def shown(capsys):
    return json.loads(capsys.readouterr().out)


@pytest.mark.fast
def test_a_config_tells_its_sources(config, tmp_path, capsys):
    tokenizer.report(config, as_json=True)
    found = shown(capsys)
    assert found["tokenizer"]["kind"] == "bytes"
    [row] = found["sources"]
    assert (row["source"], row["documents"], row["bytes_per_token"]) == (str(tmp_path / "texts"), 4, 1.0)
    assert found["all"] == {**row, "source": "all"}
    assert row["tokens_per_word"] == row["tokens"] / (4 * 6)
    assert row["fallback_share"] == 8 / row["tokens"]


@pytest.mark.fast
def test_a_tokenizer_file_tells_the_texts_that_are_named(config, tmp_path, capsys):
    file = tmp_path / "tokenizer.json"
    file.write_text(content_of("word_piece"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the fox"}\n{"text": "\u65e5 \ud55c"}\n')
    texts = [str(tmp_path / "texts"), str(rows)]
    tokenizer.report(str(file), text=texts, as_json=True)
    found = shown(capsys)
    assert [row["source"] for row in found["sources"]] == texts
    assert [row["documents"] for row in found["sources"]] == [4, 2]
    assert found["sources"][1]["tokens"] == 4
    assert found["sources"][1]["fallback_share"] == 0.25, "one character is not in the vocabulary"
    tokenizer.report(str(file), text=texts)
    assert "bytes a token" in capsys.readouterr().out


def test_a_dataset_has_its_own_tokenizer(config, tmp_path, capsys):
    data.prepare(config)
    capsys.readouterr()
    tokenizer.report(config, ["tokenizer={kind: sentencepiece, vocab_size: 300}"], as_json=True)
    assert shown(capsys)["tokenizer"]["kind"] == "bytes", "the one with which the dataset was made"
    tokenizer.report(str(tmp_path / "dataset"), text=[str(tmp_path / "texts" / "0.txt")], as_json=True)
    assert shown(capsys)["all"]["documents"] == 1


@pytest.mark.fast
def test_what_cannot_be_measured_is_refused(config, tmp_path):
    with pytest.raises(InputError, match="not trained yet; run `lmjax data prepare` first"):
        tokenizer.report(config, ["tokenizer={kind: sentencepiece, vocab_size: 300}"])
    with pytest.raises(InputError, match="a tokenizer alone has no text; give some with --text"):
        tokenizer.report(str(tmp_path))
    with pytest.raises(InputError, match="overrides apply to a config"):
        tokenizer.report(str(tmp_path), ["data.ftfy=false"], text=["a.txt"])
    with pytest.raises(InputError, match=r"no tokenizer here; looked for tokenizer\.model and tokenizer\.json"):
        tokenizer.report(str(tmp_path), text=["a.txt"])


@pytest.mark.fast
def test_special_tokens_that_are_missing_end_the_command_with_2_and_one_message(config, tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_text(content_of("byte_level"))
    found = f"tokenizer={{kind: huggingface, path: {tmp_path}/tokenizer.json, eos_token: </s>}}"
    assert lmjax("tokenizer", "report", config, found) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"lmjax: {tmp_path}/tokenizer.json: eos_token is '</s>', which its vocabulary")
    assert message.count("\n") == 1
    assert lmjax("tokenizer", "report", config, found.replace("</s>", "<|endoftext|>")) == 0
