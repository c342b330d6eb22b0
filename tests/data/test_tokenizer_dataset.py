"""A dataset that is prepared with a Hugging Face tokenizer keeps all of it."""

import json

import pytest

from lmjax.data.config import DataConfig, FilesSource
from lmjax.data.index import read_index
from lmjax.data.prepare import check_options, prepare
from lmjax.data.tokenizer import HuggingFaceFile, load_tokenizer, open_tokenizer
from lmjax.errors import InputError
from tests.data.tiny_tokenizers import LINES, content_of

TEMPLATE = "{{ messages }}"


@pytest.fixture
def config(tmp_path):
    (tmp_path / "texts").mkdir()
    for number, line in enumerate(LINES[:3]):
        (tmp_path / "texts" / f"{number}.txt").write_text(line)
    (tmp_path / "tokenizer.json").write_text(content_of("byte_level"))
    roles = {"bos_token": "<|begin|>", "eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    return DataConfig(
        path=str(tmp_path / "dataset"),
        sources=(FilesSource(path=str(tmp_path / "texts")),),
        sequence_length=16,
        validation_fraction=0.0,
        num_workers=1,
    )


def test_the_shards_hold_its_tokens_and_the_directory_its_files(config, tmp_path):
    chosen = HuggingFaceFile(path=str(tmp_path / "tokenizer.json"))
    prepare(config, chosen)
    index = read_index(config.path)
    tokenizer = open_tokenizer(chosen)
    assert (index.tokenizer.kind, index.tokenizer.chat_template) == ("huggingface", TEMPLATE)
    assert index.tokenizer.special_tokens == tokenizer.special_tokens()
    [shard] = index.shards
    assert shard.tokens == sum(2 + len(tokenizer.encode(line)) for line in LINES[:3])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    kept = load_tokenizer(config.path)
    assert (kept.fingerprint, kept.chat_template) == (tokenizer.fingerprint, TEMPLATE)
    assert (kept.bos_id, kept.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_another_token_that_ends_documents_is_another_dataset(config, tmp_path):
    path = str(tmp_path / "tokenizer.json")
    prepare(config, HuggingFaceFile(path=path))
    index = read_index(config.path)
    check_options(config.path, index, config, HuggingFaceFile(path=path))
    with pytest.raises(InputError, match=r"tokenizer\.path: prepared with"):
        check_options(config.path, index, config, HuggingFaceFile(path=path, eos_token="<|pad|>"))


def test_a_tokenizer_in_which_nothing_ends_a_document_makes_no_dataset(config, tmp_path):
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="no token of it ends a document"):
        prepare(config, HuggingFaceFile(path=str(tmp_path / "tokenizer.json")))
