"""Tokenizers of Hugging Face directories, and ours as such files: the same tokens for any text."""

import json
import sysconfig
from pathlib import Path

import pytest
import tokenizers

from lmjax.convert.tokenizer import end_ids_in, huggingface_files, tokenizer_in
from lmjax.data.sample import train_model
from lmjax.data.tokenizer import ByteTokenizer, SentencePieceTrained
from lmjax.data.tokenizer_sentencepiece import SentencePieceTokenizer
from lmjax.errors import InputError

TEXTS = [
    "",
    " ",
    "naïve café — “x”\t10 €  \r\n",
    "a  b   c    d",
    "    if x:\n\n\n        return  \n",
    "\u4f60\u597d \U0001f600",
]


def code() -> list[str]:
    """Python, the same on a machine each time."""
    root = Path(sysconfig.get_path("stdlib"))
    return [(root / name).read_text() for name in ("argparse.py", "textwrap.py", "queue.py")]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(request) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(
        train_model(SentencePieceTrained(vocab_size=700, model_type=request.param), code()), ""
    )


def written(directory: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def test_a_sentencepiece_model_gives_the_same_tokens_as_a_tokenizer_json(trained, tmp_path):
    files = huggingface_files(trained)
    theirs = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    texts = [*TEXTS, *(code() if trained.is_bpe else code()[:1])]
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == trained.encode(text)
        assert theirs.decode(ids) == text
    assert theirs.encode("a").ids == [trained.bos_id, *trained.encode("a")]
    opened = tokenizer_in(written(tmp_path, files))
    assert (opened.bos_id, opened.eos_id, opened.pad_id) == (trained.bos_id, trained.eos_id, trained.pad_id)
    assert opened.vocab_size == trained.vocab_size
    assert files["tokenizer.model"], "its own file comes along"


def test_bytes_are_the_same_tokens_as_a_tokenizer_json(tmp_path):
    ours, theirs = ByteTokenizer(), tokenizer_in(written(tmp_path, huggingface_files(ByteTokenizer())))
    for text in TEXTS:
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(theirs.encode(text)) == text
    assert (theirs.bos_id, theirs.eos_id, theirs.pad_id) == (256, 257, 258)


@pytest.mark.parametrize(
    ("settings", "template", "bos_id"),
    [
        ({"add_bos_token": True}, False, 256),
        ({"add_bos_token": False}, True, None),
        ({}, True, 256),
        ({}, False, None),
    ],
)
def test_bos_is_put_before_a_text_where_the_tokenizer_itself_does(tmp_path, settings, template, bos_id):
    files = huggingface_files(ByteTokenizer())
    tree, roles = json.loads(files["tokenizer.json"]), json.loads(files["tokenizer_config.json"])
    del roles["add_bos_token"]
    if not template:
        tree["post_processor"] = None
    files["tokenizer.json"] = json.dumps(tree).encode()
    files["tokenizer_config.json"] = json.dumps(roles | settings).encode()
    assert tokenizer_in(written(tmp_path, files)).bos_id == bos_id


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": [7, 9]}, {"eos_token_id": 5}, {7, 9}),
        ({"eos_token_id": 7}, {}, {7}),
        ({}, {"eos_token_id": 5}, set()),
        (None, {"eos_token_id": 5}, {5}),
        (None, {"eos_token_id": None}, set()),
        (None, None, set()),
    ],
)
def test_the_tokens_that_end_a_text_are_those_of_generation_config(tmp_path, generation, config, ends):
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert end_ids_in(tmp_path) == ends
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(InputError, match="eos_token_id is '</s>'; it is the number of a token"):
        end_ids_in(tmp_path)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer: looked for tokenizer\.json"):
        tokenizer_in(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[1]")
    with pytest.raises(InputError, match="list where an object is expected"):
        tokenizer_in(tmp_path)
