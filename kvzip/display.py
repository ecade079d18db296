"""Text made safe to show: a document, an answer, a title or a file's name may hold what steers a terminal."""

import re

_STEERING = (
    "\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff"
)
"""Controls but newline and tab, other line ends, what turns the direction of text, marks that are no letters, and
halves of characters."""
_IN_TEXT = re.compile(f"[{_STEERING}]")
_IN_LINE = re.compile(f"[\t\n{_STEERING}]")


def visible(text: str) -> str:
    r"""Returns a text in which every character that steers a terminal is shown as its escape, as `\x1b`.

    Newlines and tabs stay, and a line that ends in CR LF ends in LF.
    """
    return _IN_TEXT.sub(_escape, text.replace("\r\n", "\n"))


def visible_line(text: str, *, limit: int | None = None) -> str:
    r"""Returns a text as one line that is safe to show: as `visible`, with newlines and tabs as `\n` and `\t` too.

    Args:
        limit: characters of the text, beyond which dots stand for the rest.
    """
    text = text if limit is None or len(text) <= limit else text[:limit] + "..."
    return _IN_LINE.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")
