"""What a dataset keeps of a Hugging Face tokenizer is what transformers reads as the same tokenizer."""

import json

import pytest

from lmjax.data.tokenizer_huggingface import HuggingFaceTokenizer, Roles
from tests.data.tiny_tokenizers import LINES, content_of

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
TEXTS = ["", "the fox", "  two  spaces\n\n\ttab ", "日本語 한국어 😀", *LINES]


@pytest.mark.slow
def test_transformers_reads_what_is_saved(tmp_path):
    transformers = pytest.importorskip("transformers")
    roles = Roles(bos_token="<|begin|>", eos_token="<|endoftext|>", chat_template=TEMPLATE)
    ours = HuggingFaceTokenizer(json.loads(content_of("byte_level")), "test", roles)
    ours.save(tmp_path)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (peer.bos_token_id, peer.eos_token_id, peer.chat_template) == (ours.bos_id, ours.eos_id, TEMPLATE)
    for text in TEXTS:
        assert peer.encode(text, add_special_tokens=False) == ours.encode(text)
        assert peer.decode(ours.encode(text), skip_special_tokens=True) == ours.decode(ours.encode(text))
