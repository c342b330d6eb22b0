"""What every document goes through before it is compared, split and tokenized."""

import functools
import re
import unicodedata
from typing import Literal

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters but tab and newline, and halves of surrogate pairs, which no UTF-8 can hold."""


def clean(text: str, *, normalize: Literal["NFC", "NFKC"] | None, repair: bool) -> str:
    """Newlines as \\n, wrong decodings repaired if ``repair`` (ftfy), control characters removed, one Unicode form."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if repair and not text.isascii():
        text = _ftfy()(text)
    text = _CONTROL.sub("", text)
    if normalize is not None and not text.isascii():
        text = unicodedata.normalize(normalize, text)
    return text


@functools.cache
def _ftfy():
    """The repair of wrong decodings alone: what ftfy also offers (straight quotes, no ligatures) changes the text."""
    import ftfy  # a tenth of a second, and only texts beyond ASCII need it

    config = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )
    return functools.partial(ftfy.fix_text, config=config)
