"""A GGUF file is to us the model and the tokenizer that it is to transformers."""

import json

import numpy as np
import pytest

from lmjax.convert.gguf_files import gguf_config
from lmjax.convert.gguf_tokenizer import gguf_tokenizer
from lmjax.convert.tensors import open_tensors
from tests.convert.gguf_models import METADATA, random_weights, write_gguf
from tests.convert.test_gguf_tokenizer import TEXTS, byte_level, train_byte_level, words

pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_is_the_same(tmp_path, rng, tied):
    pytest.importorskip("accelerate")
    metadata = {**METADATA, "llama.vocab_size": 64}
    write_gguf(tmp_path / "model.gguf", random_weights(rng, tied=tied), kind="Q8_0", metadata=metadata)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    config = gguf_config(tmp_path / "model.gguf")
    theirs = {**model.config.to_dict(), **model.config.rope_parameters}
    assert config.pop("architectures") == [type(model).__name__]
    assert config == {key: theirs[key] for key in config}
    files = open_tensors(tmp_path)
    state = model.state_dict()
    assert files.infos.keys() == state.keys() - ({"lm_head.weight"} if tied else set())
    for name in files.infos:
        np.testing.assert_array_equal(files.read(name), state[name].numpy(), err_msg=name)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "tekken"])
def test_the_tokenizer_is_the_same(tmp_path, pre):
    _, metadata = train_byte_level(words(byte_level(True)))
    metadata |= {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": True, "llama.vocab_size": 420}
    metadata["tokenizer.chat_template"] = "{% for m in messages %}<|bos|>{{ m.content }}<|eos|>{% endfor %}"
    path = tmp_path / "file" / "model.gguf"
    path.parent.mkdir()
    write_gguf(path, {}, metadata={**METADATA, **metadata})
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for name, content in gguf_tokenizer(path).items():
        (tmp_path / name).write_text(json.dumps(content))
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours(text, add_special_tokens=False).input_ids == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    assert (ours.bos_token, ours.eos_token) == (theirs.bos_token, theirs.eos_token)
    chat = [{"role": "user", "content": "hi 12"}]
    assert ours.apply_chat_template(chat)["input_ids"] == theirs.apply_chat_template(chat)["input_ids"]
