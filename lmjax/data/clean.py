"""What is done to a document's text before it is tokenized."""

import re
import unicodedata

import ftfy

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff\ud800-\udfff]")
"""Control characters but tab, line feed and next line; the byte order mark; what is no character."""

_REPAIR = ftfy.TextFixerConfig(
    unescape_html=False,
    remove_terminal_escapes=True,
    fix_encoding=True,
    restore_byte_a0=True,
    replace_lossy_sequences=True,
    decode_inconsistent_utf8=True,
    fix_c1_controls=True,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    fix_surrogates=True,
    remove_control_chars=False,
    normalization=None,
)
"""Only mis-decoded characters; typography stays as its author had it."""


def clean(text: str, *, unicode_form: str | None, repair: bool) -> str:
    """``text`` with line feeds alone as line ends, without control characters, in the Unicode normal form asked for."""
    if repair:
        text = ftfy.fix_text(text, _REPAIR)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _CONTROL.sub("", text)
    return text if unicode_form is None else unicodedata.normalize(unicode_form, text)  # pyright: ignore
