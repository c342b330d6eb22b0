"""A tokenizer.json does here what it does in ``tokenizers``, whatever was stored beside the vocabulary."""

import json

import numpy as np
import pytest
import tokenizers

from lmjax.data.index import Index, read_index, write_index
from lmjax.data.tokenizer import (
    HuggingFaceFile,
    SentencePieceFile,
    load_tokenizer,
    open_tokenizer,
    tokenizer_entry,
)
from lmjax.data.tokenizer_huggingface import HuggingFaceTokenizer, Roles
from lmjax.errors import InputError
from tests.data.tiny_tokenizers import KINDS, LINES, content_of

pytestmark = pytest.mark.fast

TEXTS = [
    "",
    " ",
    "the fox",
    "  two  spaces\n\n\ttab ",
    "日本語のテキスト。한국어 😀 e\u0301",
    "def f(x):\n    return 1",
    "x" * 300,
    *LINES,
]
EOS = {"byte_level": "<|endoftext|>", "byte_fallback": "</s>", "word_piece": "[SEP]", "unigram": "</s>"}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def made(kind: str, roles: Roles | None = None, **changes) -> HuggingFaceTokenizer:
    tree = json.loads(content_of(kind)) | changes
    return HuggingFaceTokenizer(tree, "test", roles or Roles(eos_token=EOS[kind]))


@pytest.fixture
def write(tmp_path):
    """``write(kind, **files)`` writes a tokenizer.json and, beside it, JSON files by their stems; returns its path."""

    def write(kind: str = "byte_level", **files):
        (tmp_path / "tokenizer.json").write_text(content_of(kind))
        for stem, content in files.items():
            (tmp_path / f"{stem}.json").write_text(json.dumps(content))
        return tmp_path / "tokenizer.json"

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_texts_are_those_of_the_package(kind):
    peer, ours = tokenizers.Tokenizer.from_str(content_of(kind)), made(kind)
    for text in TEXTS:
        tokens = peer.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == tokens
        assert ours.decode([*tokens, ours.special_tokens()[EOS[kind]]]) == peer.decode(tokens)
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
    assert ours.encode_batch([]) == []
    assert ours.vocab_size == peer.get_vocab_size()


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_text_comes_back(kind):
    ours = made(kind)
    for text in [*TEXTS, "".join(ours.special_tokens())]:
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_that_a_text_spells_are_text(kind):
    text = f"a {EOS[kind]} b"
    ours = made(kind)
    assert not set(ours.special_tokens().values()) - ours.fallback_ids() & set(ours.encode(text))
    assert ours.eos_id in tokenizers.Tokenizer.from_str(content_of(kind)).encode(text).ids


@pytest.mark.parametrize("stored", ["truncation", "padding", "dropout"])
def test_what_was_stored_for_training_changes_no_encoding(stored):
    peer = tokenizers.Tokenizer.from_str(content_of("byte_level"))
    if stored == "truncation":
        peer.enable_truncation(5)
    elif stored == "padding":
        peer.enable_padding(length=64)
    else:
        assert isinstance(peer.model, tokenizers.models.BPE)
        peer.model.dropout = 1.0
    plain = made("byte_level")
    ours = HuggingFaceTokenizer(json.loads(peer.to_str()), "test", Roles(eos_token=EOS["byte_level"]))
    assert ours.encode(LINES[0]) == plain.encode(LINES[0]) != peer.encode(LINES[0]).ids
    assert ours.encode_batch(LINES) == plain.encode_batch(LINES)
    assert ours.fingerprint == plain.fingerprint


def test_a_post_processor_adds_nothing():
    peer = tokenizers.Tokenizer.from_str(content_of("byte_level"))
    peer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", peer.token_to_id("<|begin|>"))]
    )
    ours = HuggingFaceTokenizer(json.loads(peer.to_str()), "test", Roles())
    assert peer.encode("fox").ids[1:] == ours.encode("fox") == made("byte_level").encode("fox")


def test_roles_come_from_the_files_beside_it(write):
    path = write(
        tokenizer_config={"bos_token": None, "eos_token": {"content": "<|endoftext|>"}, "chat_template": TEMPLATE},
        special_tokens_map={"eos_token": "<|begin|>", "pad_token": "<|pad|>"},
    )
    found = load_tokenizer(path)
    ids = found.special_tokens()
    assert list(ids) == ["<|endoftext|>", "<|begin|>", "<|pad|>"]
    assert (found.bos_id, found.eos_id, found.pad_id) == (None, ids["<|endoftext|>"], ids["<|pad|>"])
    assert found.chat_template == TEMPLATE
    assert load_tokenizer(path.parent).fingerprint == found.fingerprint


def test_of_several_chat_templates_the_default_is_taken_and_a_file_of_its_own_before_all(write):
    several = [{"name": "tools", "template": "tools"}, {"name": "default", "template": TEMPLATE}]
    path = write(tokenizer_config={"chat_template": several})
    assert load_tokenizer(path).chat_template == TEMPLATE
    (path.parent / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(path).chat_template == "from the file"


def test_the_config_names_tokens_before_the_files_do(write):
    path = str(write(tokenizer_config={"bos_token": "<|begin|>", "eos_token": "<|begin|>"}))
    ids = load_tokenizer(path).special_tokens()
    named = open_tokenizer(HuggingFaceFile(path=path, eos_token="<|endoftext|>"))
    assert (named.bos_id, named.eos_id) == (ids["<|begin|>"], ids["<|endoftext|>"])
    assert open_tokenizer(HuggingFaceFile(path=path, bos_token="")).bos_id is None
    fox = named.encode("f")[0]
    assert open_tokenizer(HuggingFaceFile(path=path, bos_token="f")).bos_id == fox, "any token of the vocabulary"


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ({"eos_token": "</s>"}, {}, "eos_token is '</s>', which its vocabulary .* '<|endoftext|>', '<|begin|>'"),
        ({"bos_token": "<s>", "eos_token": "<|pad|>"}, {}, "set tokenizer.bos_token to a token of it"),
        ({}, {"tokenizer_config": {"eos_token": "</s>"}}, "eos_token is '</s>'"),
        ({}, {"tokenizer_config": {"bos_token": "<|begin|>"}}, "no token of it ends a document.*set tokenizer.eos_to"),
        ({}, {}, "no token of it ends a document"),
        ({}, {"tokenizer_config": {"eos_token": 3}}, "eos_token in tokenizer_config.json is 3"),
        ({}, {"tokenizer_config": {"chat_template": 3}}, "chat_template is int"),
        ({}, {"tokenizer_config": []}, "tokenizer_config.json: list where an object is expected"),
    ],
)
def test_special_tokens_that_are_missing_are_refused(write, config, files, message):
    path = write(**files)
    with pytest.raises(InputError, match=message):
        open_tokenizer(HuggingFaceFile(path=str(path), **config))


def test_a_sentencepiece_model_in_which_nothing_ends_a_document_is_refused(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(tmp_path / "a"), vocab_size=60, eos_id=-1, minloglevel=4
    )
    assert load_tokenizer(tmp_path / "a.model").eos_id is None
    with pytest.raises(InputError, match=r"a\.model: no token of it ends a document"):
        open_tokenizer(SentencePieceFile(path=str(tmp_path / "a.model")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model": {"type": "BPE"', "tokenizer.json: not JSON"),
        ('{"model": {"type": "BPE"}}', "tokenizer.json: not a tokenizer that `tokenizers` can read"),
        ('{"model": 3}', "tokenizer.json: not a tokenizer that `tokenizers` can read"),
        ("[]", "tokenizer.json: not the file of a tokenizer"),
    ],
)
def test_a_damaged_file_is_an_input_error(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=message):
        open_tokenizer(HuggingFaceFile(path=str(tmp_path / "tokenizer.json")))


def test_damaged_files_beside_it_are_an_input_error(write):
    path = write()
    (path.parent / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: cannot be read"):
        load_tokenizer(path)


def test_the_file_of_a_bytes_tokenizer_is_none_of_hugging_face(tmp_path):
    from lmjax.data.tokenizer import ByteTokenizer

    ByteTokenizer().save(tmp_path)
    with pytest.raises(InputError, match="the file of a bytes tokenizer"):
        open_tokenizer(HuggingFaceFile(path=str(tmp_path / "tokenizer.json")))


def test_a_saved_tokenizer_is_the_same_with_its_roles(tmp_path):
    roles = Roles(bos_token="<|begin|>", eos_token="<|endoftext|>", chat_template=TEMPLATE)
    ours = made("byte_level", roles)
    assert ours.save(tmp_path) == "tokenizer.json"
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == ours.fingerprint
    assert (again.bos_id, again.eos_id, again.chat_template) == (ours.bos_id, ours.eos_id, TEMPLATE)
    peer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert peer.encode(LINES[0]).ids == ours.encode(LINES[0])


def test_a_dataset_carries_special_tokens_and_chat_template(tmp_path):
    ours = made("byte_level", Roles(bos_token="<|begin|>", eos_token="<|endoftext|>", chat_template=TEMPLATE))
    ours.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    index = Index(
        tokenizer=tokenizer_entry(ours),
        token_dtype="uint16",
        shards=(),
        token_counts=tuple(np.zeros(ours.vocab_size, int).tolist()),
    )
    write_index(tmp_path, index)
    assert read_index(tmp_path) == index
    again = load_tokenizer(tmp_path)
    assert (again.bos_id, again.eos_id, again.pad_id) == (ours.bos_id, ours.eos_id, None)
    assert (again.chat_template, again.fingerprint) == (TEMPLATE, ours.fingerprint)
    (tmp_path / "tokenizer.json").write_text(content_of("unigram"))
    with pytest.raises(InputError, match="bos_token is|not the tokenizer that the dataset was made with"):
        load_tokenizer(tmp_path)


def test_fingerprints_tell_vocabularies_and_roles_apart():
    roles = [Roles(), Roles(eos_token="<|endoftext|>"), Roles(eos_token="<|begin|>"), Roles(chat_template=TEMPLATE)]
    found = [made("byte_level", role).fingerprint for role in roles]
    found += [
        made("word_piece", Roles()).fingerprint,
        made("byte_level", Roles(), normalizer={"type": "NFC"}).fingerprint,
    ]
    assert len(set(found)) == len(found)
    assert made("byte_level").fingerprint == made("byte_level").fingerprint


def test_a_vocabulary_with_a_hole_counts_up_to_its_last_token():
    tree = json.loads(content_of("word_piece"))
    vocabulary = tree["model"]["vocab"]
    vocabulary["fox"] = 1000
    ours = made("word_piece", model=tree["model"])
    assert ours.vocab_size == 1001 > len(vocabulary)
    assert ours.encode("fox") == [1000]
    assert ours.decode([999, 1000]) == "fox"


def test_special_tokens_that_are_pieces_of_the_model_are_taken_apart():
    ours = made("unigram")
    assert ours.decode(ours.encode("a</s><s>b")) == "a</s><s>b"
    tree = json.loads(content_of("word_piece"))
    words = made("word_piece", pre_tokenizer={"type": "WhitespaceSplit"}, normalizer=None)
    assert words.encode("[SEP]") == [
        tree["model"]["vocab"].get(piece, 0) for piece in ("[", "##S", "##E", "##P", "##]")
    ]


def test_parts_of_characters_and_unknown_tokens_are_told():
    for kind, text, share in [
        ("byte_level", "\U0010ffff", 1.0),
        ("byte_level", "the fox 10", 0.0),
        ("byte_fallback", "한", 0.75),
        ("word_piece", "한", 1.0),
        ("unigram", "한", 0.5),
    ]:
        ours = made(kind)
        tokens = ours.encode(text)
        assert sum(token in ours.fallback_ids() for token in tokens) / len(tokens) == share, (kind, text)
