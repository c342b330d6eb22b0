"""Text that is given out token by token is the text of all tokens, and no piece of it has half a character."""

import json

import pytest

from lmjax.data.sample import train_model
from lmjax.data.tokenizer import ByteTokenizer, SentencePieceTrained, Tokenizer
from lmjax.data.tokenizer_huggingface import HuggingFaceTokenizer, Roles
from lmjax.data.tokenizer_sentencepiece import SentencePieceTokenizer
from lmjax.data.tokenizer_stream import incremental_decoder
from tests.data.tiny_tokenizers import KINDS, LINES, content_of

pytestmark = pytest.mark.fast
TEXTS = ["", "the fox  jumps", "日本語のテキスト 😀👩‍👩‍👧 naïve", " leading\n\tand trailing ", *LINES]


@pytest.fixture(scope="module")
def tokenizers():
    found: dict[str, Tokenizer] = {
        f"hf_{kind}": HuggingFaceTokenizer(json.loads(content_of(kind)), kind, Roles()) for kind in KINDS
    }
    for model_type in ("bpe", "unigram"):
        config = SentencePieceTrained(vocab_size=320, model_type=model_type)
        found[model_type] = SentencePieceTokenizer(train_model(config, LINES), model_type)
    return {"bytes": ByteTokenizer(), **found}


@pytest.fixture(params=["bytes", "bpe", "unigram", *(f"hf_{kind}" for kind in KINDS)])
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


def stream(tokenizer, tokens, prompt=()):
    decoder = incremental_decoder(tokenizer, prompt)
    return [decoder.push(token) for token in tokens], decoder.flush()


def test_a_text_comes_back_in_whole_characters(tokenizer):
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        pieces, rest = stream(tokenizer, tokens)
        assert "".join(pieces) + rest == tokenizer.decode(tokens)
        assert not any("\ufffd" in piece for piece in pieces)


def test_any_tokens_after_any_prompt_give_the_text_of_all(tokenizer, rng):
    parts = sorted(tokenizer.fallback_ids())
    special = sorted(tokenizer.special_tokens().values())
    for _ in range(300):
        kinds = rng.integers(0, 4, rng.integers(1, 14))
        pools = [range(tokenizer.vocab_size), range(tokenizer.vocab_size), parts, special]
        tokens = [int(rng.choice(pools[kind])) for kind in kinds]
        prompt = tokenizer.encode(str(rng.choice(TEXTS)))
        while prompt and prompt[-1] in tokenizer.held_ids:  # a prompt ends in a whole text
            prompt.pop()
        pieces, rest = stream(tokenizer, tokens, prompt)
        whole = tokenizer.decode([*prompt, *tokens])
        assert "".join(pieces) + rest == whole[len(tokenizer.decode(prompt)) :], (prompt, tokens)
        pieces, rest = stream(tokenizer, tokens)
        assert "".join(pieces) + rest == tokenizer.decode(tokens), tokens


@pytest.mark.parametrize("kind", ["bytes", "hf_byte_level", "bpe"])
def test_a_character_comes_with_its_last_byte(tokenizers, kind):
    tokenizer = tokenizers[kind]
    tokens = tokenizer.encode("a\U0010ffffb")
    pieces, rest = stream(tokenizer, tokens)
    assert [piece for piece in pieces if piece] == ["a", "\U0010ffff", "b"]
    assert rest == ""
    assert "".join(tokenizer.decode([token]) for token in tokens) != "a\U0010ffffb", "one by one they are no text"


def test_what_never_became_a_character_comes_at_the_end(tokenizers):
    tokenizer = tokenizers["bytes"]
    assert stream(tokenizer, list("é".encode())[:1]) == ([""], "\ufffd")
    decoder = incremental_decoder(tokenizer)
    assert (decoder.push(97), decoder.flush(), decoder.flush()) == ("a", "", "")


def test_a_run_of_byte_tokens_waits_for_its_end(tokenizers):
    tokenizer = tokenizers["hf_byte_fallback"]
    whole = tokenizer.encode("\U0010ffff")[-4:]
    letter = tokenizer.encode("fox")[-1]
    assert stream(tokenizer, [letter, *whole, letter])[0][1:5] == [""] * 4
    broken = [letter, *whole, whole[0], letter]
    assert "".join(stream(tokenizer, broken)[0]) == tokenizer.decode(broken)
    assert tokenizer.decode(broken).count("\ufffd") == 5, "one wrong byte changes the text of the run before it"


def test_only_the_last_tokens_are_decoded_again(tokenizer):
    longest = 0

    class Watched:
        held_ids = tokenizer.held_ids

        def decode(self, ids):
            nonlocal longest
            longest = max(longest, len(ids))
            return tokenizer.decode(ids)

    tokens = tokenizer.encode("the fox jumps over the lazy dog " * 20)
    stream(Watched(), tokens)
    assert longest < 8 < len(tokens)
