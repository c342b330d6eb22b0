"""Cleaning: what is removed, what is repaired, and what is left alone."""

import pytest

from lmjax.data.clean import clean

pytestmark = pytest.mark.fast


def plain(text):
    return clean(text, normalize=None, repair=False)


def test_control_characters_go_and_tabs_and_newlines_stay():
    controls = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)]))
    assert plain(f"a{controls}b") == "a\t\n\nb"  # the carriage return is a newline of old
    assert plain("a\r\nb\rc") == "a\nb\nc"
    assert plain("half\ud800 a pair") == "half a pair"


def test_what_is_not_a_control_character_stays():
    text = "  a\t▁ \u200d\u00a0\ufeff\ue000 👩‍👩‍👧 日本語 “é” e\u0301 \n\n"
    assert plain(text) == text


@pytest.mark.parametrize(("form", "expected"), [("NFC", "é ﬁ"), ("NFKC", "é fi"), (None, "e\u0301 ﬁ")])
def test_the_unicode_form_is_the_one_asked_for(form, expected):
    assert clean("e\u0301 ﬁ", normalize=form, repair=False) == expected


@pytest.mark.parametrize(("broken", "meant"), [("cafÃ©", "café"), ("naÃ¯ve\nâ€œyesâ€\x9d", "naïve\n“yes”")])
def test_prose_that_was_decoded_wrongly_is_repaired_and_code_is_not(broken, meant):
    assert clean(broken, normalize="NFC", repair=True) == meant
    assert "Ã" in clean("cafÃ©", normalize="NFC", repair=False)


@pytest.mark.parametrize(
    "text", ["“curly” ‘quotes’ — and ﬁne ligatures", "&amp; &eacute;", "Это текст. 日本語 ｆｕｌｌ"]
)
def test_repair_leaves_good_text_alone(text):
    assert clean(text, normalize="NFC", repair=True) == text
