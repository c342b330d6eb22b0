"""What every document goes through before it is compared, split and tokenized."""

import functools
import re
import unicodedata
from collections.abc import Callable
from typing import Literal

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters but tab and newline, and halves of surrogate pairs, which no UTF-8 can hold."""
_REPAIRABLE = re.compile("[\x80-\x9f\ud800-\udfff]")


def clean(text: str, *, normalize: Literal["NFC", "NFKC"] | None, repair: bool) -> str:
    """Newlines as \\n, wrong decodings repaired if ``repair`` (ftfy), control characters removed, one Unicode form."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if repair and not text.isascii():
        text = _repair()(text)
    text = _CONTROL.sub("", text)
    if normalize is not None and not text.isascii():
        text = unicodedata.normalize(normalize, text)
    return text


@functools.cache
def _repair() -> Callable[[str], str]:
    """ftfy's repair of wrong decodings alone: what else it offers (straight quotes, no ligatures) changes the text."""
    import ftfy  # here, since it takes a tenth of a second and only prose beyond ASCII needs it
    from ftfy.badness import is_bad

    config = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
    )

    def repair(text: str) -> str:
        # ftfy goes line by line as well, and asks the same of each, several times, before it changes it; most end here.
        return "\n".join(
            ftfy.fix_text(line, config) if not line.isascii() and (_REPAIRABLE.search(line) or is_bad(line)) else line
            for line in text.split("\n")
        )

    return repair
