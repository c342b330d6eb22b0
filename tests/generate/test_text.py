"""Text as it grows: whole characters, and nothing of a stop string."""

import pytest

from lmjax.data.tokenizer import ByteTokenizer
from lmjax.data.tokenizer_stream import incremental_decoder
from lmjax.generate.text import TextStream

pytestmark = pytest.mark.fast

TEXT = "Grüße: 漢字, 🙂 and plain.\n"


def pieces(text: bytes, stop=()) -> tuple[list[str], TextStream, int]:
    """What comes with each byte, the rest at the end, and how many bytes were read."""
    tokenizer = ByteTokenizer()
    stream = TextStream(incremental_decoder(tokenizer, tokenizer.encode("prompt")), stop)
    found = []
    for token in text:
        found.append(stream.feed(token))
        if stream.stopped:
            break
    read = len(found)
    found.append(stream.finish())
    return found, stream, read


def test_a_character_comes_whole_with_its_last_byte():
    found, stream, _ = pieces(TEXT.encode())
    assert [piece for piece in found if piece] == list(TEXT)
    assert stream.text == TEXT


def test_bytes_that_are_no_character_come_when_that_is_sure():
    found, stream, _ = pieces(b"a\xf0\x9fb\xe2\x82")
    assert found == ["a", "", "", "\ufffdb", "", "", "\ufffd"]
    assert stream.text == "a\ufffdb\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", ("\n\n",), "one"),
        ("aab ab", ("ab",), "a"),
        ("abcabd!", ("abd", "zz"), "abc"),
        ("xEND of", (" of", "END", "ND"), "x"),
        ("a longer stop", ("stopping",), "a longer stop"),
        ("字と字", ("と",), "字"),
        ("first", ("first",), ""),
        ("abcde", ("bcd", "c"), "ab"),  # what is complete first ends the text
    ],
)
def test_text_ends_before_the_stop_string_and_no_part_of_one_is_shown(text, stop, expected):
    found, stream, read = pieces(text.encode(), stop)
    assert "".join(found) == stream.text == expected
    assert stream.stopped == (expected != text)
    if stream.stopped:
        ends = [text.index(one) + len(one) for one in stop if one in text]
        assert read == len(text[: min(ends)].encode())


def test_what_might_become_a_stop_string_is_held_until_it_cannot():
    found, _, _ = pieces(b"a<en<end", ("<end>",))
    assert found == ["a", "", "", "", "<en", "", "", "", "<end"]


def test_the_rest_is_given_once():
    _, stream, _ = pieces(b"a<", ("<end>",))
    assert stream.text == "a<"
    assert stream.finish() == ""
