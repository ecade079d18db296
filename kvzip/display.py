"""Text made safe to print: documents, answers, titles and file names may hold characters that control a terminal."""

import re
from collections.abc import Sequence

_CONTROLS = (
    "\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff"
)
"""Control characters except newline and tab, other line ends, changes of text direction, invisible marks, and halves
of surrogate pairs."""
_IN_TEXT = re.compile(f"[{_CONTROLS}]")
_IN_LINE = re.compile(f"[\t\n{_CONTROLS}]")


def visible(text: str) -> str:
    r"""Returns a text in which characters that control a terminal are replaced by their escapes, such as `\x1b`.

    Newlines and tabs stay, and CR LF becomes LF.
    """
    return _IN_TEXT.sub(_escape, text.replace("\r\n", "\n"))


def visible_line(text: str, *, limit: int | None = None) -> str:
    r"""Returns a text as one line, escaped as `visible` does, with newlines and tabs as `\n` and `\t`.

    Args:
        limit: characters of the text, after which dots stand for the rest.
    """
    text = text if limit is None or len(text) <= limit else text[:limit] + "..."
    return _IN_LINE.sub(_escape, text)


def shown_bits(bits: int | Sequence[int]) -> str:
    """Returns "4 bits", or "8 and 4 bits" of keys and values that differ."""
    different = dict.fromkeys([bits] if isinstance(bits, int) else bits)
    return f"{' and '.join(map(str, different))} bits"


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
