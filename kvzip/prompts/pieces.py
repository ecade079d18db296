"""Text that comes in pieces to the ids of the whole."""

import re
from collections.abc import Iterable, Iterator

from .encoding import split_ids
from .rendering import check_text
from .tokenizer import Tokenizer

_BLOCK, _AROUND, _TRIES = 1 << 16, 64, 16  # characters, characters, places


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[str], *, before: str = "") -> Iterator[list[int]]:
    """Yields the ids of a text that comes in pieces; joined, they are the ids of the whole text behind `before`.

    About 64 Ki characters are encoded at a time. A block is cut in front of white space, at a place where the tokens
    of the 64 characters before it do not depend on the 64 behind it; the next block is encoded behind those
    characters. So the ids are exact for every tokenizer whose merges reach no further than that. Text without such a
    place is held until one comes.
    """
    held = ""
    for piece in pieces:
        check_text(piece)
        for at in range(0, len(piece), _BLOCK):
            held += piece[at : at + _BLOCK]
            cut = _safe_cut(tokenizer, before + held, len(before)) if len(held) >= _BLOCK else None
            if cut is not None:
                text = before + held
                yield split_ids(tokenizer, text[:cut], stop=len(before))[1]
                before, held = text[max(0, cut - _AROUND) : cut], text[cut:]
    if held:
        yield split_ids(tokenizer, before + held, stop=len(before))[1]


def _safe_cut(tokenizer: Tokenizer, text: str, start: int) -> int | None:
    """The last place after `start` where the text may be cut, as far as the text behind it shows; else None."""
    places = [m.start() for m in re.finditer(r"(?<=\S)\s", text[:-_AROUND]) if m.start() > start]
    for cut in places[: -_TRIES - 1 : -1]:
        before = text[max(0, cut - _AROUND) : cut]
        alone, longer = (
            tokenizer.text.encode(part, add_special_tokens=False).ids
            for part in (before, before + text[cut : cut + _AROUND])
        )
        if longer[: len(alone)] == alone:
            return cut
    return None
