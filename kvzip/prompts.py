"""Prompts as data: chat templates split around the context, the repeat prompts, text to ids and back.

The string of a control token in a document or a query is encoded as plain text: only a template writes control tokens.
"""

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile

from tokenizers import Tokenizer as _Tokenizer

from .templates import QUERY_SEPARATOR, ChatTemplate, Prompt, check_text, literals, render, turn_close

__all__ = [
    "QUERY_SEPARATOR",
    "REPEAT_FIRST",
    "REPEAT_NEXT",
    "ChatTemplate",
    "Prompt",
    "Tokenizer",
    "check_text",
    "control_text",
    "decode",
    "encode_context",
    "encode_control",
    "encode_pieces",
    "encode_prefix",
    "encode_text",
    "encode_turn",
    "make_tokenizer",
    "prefix_text",
    "render",
    "text_of",
    "token_bytes",
    "turn_close",
    "turn_end",
    "turn_opened",
]

REPEAT_FIRST = "\n\nRepeat the previous context exactly."
REPEAT_NEXT = "\n\nRepeat the part of the previous context exactly, starting with "

_LEFT = 16  # tokens in front of a text that may change how it is encoded
_BLOCK, _AROUND, _TRIES = 1 << 16, 64, 16  # encode_pieces: characters of a block, around a cut; cuts tried


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary in two spellings, so that only a template can write control tokens.

    `control` spells control tokens as the checkpoint does. `text` is the same vocabulary, but spells each control token
    between two copies of `mark`, random characters of Unicode's private use that no document can know. `control_text`
    spells a template's text that way, so that it can be joined to the caller's text and both encoded as one.

    `names` matches the control tokens as a template writes them. `bos_ids` come in front of a text without a template.
    `rows` is the number of rows of the embedding, where that is less than the number of tokens.
    """

    text: _Tokenizer
    control: _Tokenizer
    bos_ids: tuple[int, ...]
    mark: str
    names: re.Pattern[str]
    rows: int | None = None

    def __repr__(self) -> str:
        return f"Tokenizer({self.control.get_vocab_size():,} tokens)"


def make_tokenizer(control: _Tokenizer, *, template: ChatTemplate | None = None, rows: int | None = None) -> Tokenizer:
    """Returns `control` with marked control tokens: the special ones, and others that the chat template writes, such
    as `<think>`.

    Args:
        rows: of the embedding; None for as many as there are tokens.
    """
    document = json.loads(control.to_str())
    written = literals(template) if template else ""
    tokens = [
        token
        for token in document["added_tokens"]
        if token["special"]
        # a plain word in a template's source, such as "role", may be a key that it reads
        or (token["content"] in written and not re.fullmatch(r"\s*\w*\s*", token["content"]))
    ]
    mark = "".join(chr(0xE000 + secrets.randbelow(0x1900)) for _ in range(4))
    spelled = {token["content"]: mark + token["content"] + mark for token in tokens}
    kept = control.normalizer is None or control.normalizer.normalize_str(mark) == mark
    alone = {token["content"] for token in tokens if token["single_word"]}
    for token in tokens:
        token["content"] = spelled[token["content"]]
        token["single_word"] = False  # `names` checks that instead: between marks no word is next to it
        # a normalizer that changes the marks would hide the token, or leave letters that a document can spell
        token["normalized"] = token["normalized"] and kept
    model = document["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {spelled.get(name, name): i for name, i in model["vocab"].items()}
    else:
        model["vocab"] = [[spelled.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") in spelled:
        model["unk_token"] = spelled[model["unk_token"]]
    if "merges" in model:  # nor may ordinary text be merged into a control token
        model["merges"] = [pair for pair in model["merges"] if not {*pair, "".join(pair)} & spelled.keys()]
    longest_first = sorted(spelled, key=len, reverse=True)
    patterns = [rf"(?<!\w){re.escape(name)}(?!\w)" if name in alone else re.escape(name) for name in longest_first]
    around = control.encode("a", add_special_tokens=True)
    in_front = len(list(takewhile(bool, around.special_tokens_mask)))
    return Tokenizer(
        text=_Tokenizer.from_str(json.dumps(document | {"post_processor": None})),
        control=control,
        bos_ids=tuple(around.ids[:in_front]),
        mark=mark,
        names=re.compile("|".join(patterns) or "(?!)"),
        rows=rows if rows is not None and rows < control.get_vocab_size() else None,
    )


def control_text(tokenizer: Tokenizer, text: str) -> str:
    """Returns a template's text with its control tokens between marks, as `Tokenizer.text` spells them."""
    return tokenizer.names.sub(lambda found: tokenizer.mark + found[0] + tokenizer.mark, text)


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Returns the text of ids, without control tokens."""
    return tokenizer.control.decode(ids, skip_special_tokens=True)


def token_bytes(tokenizer: Tokenizer, ids: Iterable[int]) -> list[bytes]:
    """Returns the UTF-8 of each token as `tokenizers` decodes it within a text; control tokens as they are written.

    A token that holds part of a character gives the bytes of that part.
    """
    vocabulary, decoder = tokenizer.control, tokenizer.control.decoder
    result = []
    for i in ids:
        name = vocabulary.id_to_token(i) or ""
        # behind a letter, since some decoders drop a space at the beginning
        text = name if decoder is None else decoder.decode(["a", name])[1:]
        partial = _raw_bytes(name) if "\ufffd" in text else None
        result.append(text.encode() if partial is None else partial)
    return result


def _raw_bytes(name: str) -> bytes | None:
    """The bytes that a token's name spells, as `<0x0A>` or in byte-level letters; None if it spells characters."""
    spelled = re.fullmatch(r"<0x([0-9A-F]{2})>", name)
    if spelled:
        return bytes.fromhex(spelled[1])
    letters = _byte_letters()
    return bytes(letters[c] for c in name) if all(c in letters for c in name) else None


@cache
def _byte_letters() -> dict[str, int]:
    """Byte-level vocabularies write each byte as a letter: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def turn_end(tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    """Returns the control token that the template puts behind an answer, if it puts one there."""
    try:
        after = (render(template).separator or "").lstrip() if template else ""
    except ValueError:  # a broken template is reported when a prompt is asked for, not when the model is loaded
        return []
    found = tokenizer.names.match(after)
    end = tokenizer.control.token_to_id(found[0]) if found else None
    return [] if end is None else [end]


def encode_text(tokenizer: Tokenizer, text: str, *, before: str = "") -> list[int]:
    """Returns the ids of a document or a query; nothing in it becomes a control token.

    Args:
        before: the text in front, as `text_of`, `prefix_text` and `control_text` spell it. Its tokens are not changed.

    Raises: ValueError for half of a surrogate pair, or a token that the model's embedding has no row for.
    """
    return encode_turn(tokenizer, text, "", before=before)


def encode_control(tokenizer: Tokenizer, text: str, *, before: str = "") -> list[int]:
    """Returns the ids of text that a template wrote, as `encode_text` does."""
    return encode_turn(tokenizer, "", text, before=before)


def encode_turn(tokenizer: Tokenizer, text: str, after: str, *, before: str = "") -> list[int]:
    """Returns the ids of the caller's text and of what the template writes after it, as `encode_text` does.

    If a token would span `before` and the text, the text is encoded behind a neutral character instead, because a
    tokenizer might put a space in front of a text encoded alone.
    """
    check_text(text)
    text += control_text(tokenizer, after)
    for left in (before, "\n", "a"):
        _, ids, joined = _split_ids(tokenizer, left + text, stop=len(left))
        if not joined:
            return ids
    return _split_ids(tokenizer, text, stop=0)[1]


def encode_prefix(tokenizer: Tokenizer, prompt: Prompt, *, context: str = "") -> list[int]:
    """Returns the ids in front of the context: the template's parts with control tokens, the caller's as plain text.

    Args:
        context: how the context begins. A token that spans the end of the prefix and the beginning of the context
            ("_The", of "[INST] " and "The") belongs to the context.
    """
    before = prefix_text(tokenizer, prompt)
    check_text(context)
    return _split_ids(tokenizer, before + context, stop=len(before))[0]


def encode_context(tokenizer: Tokenizer, text: str, *, before: str = "") -> list[int]:
    """Returns the ids of a context: those of prefix and context as one text, less those of `encode_prefix`.

    Raises: as `encode_text` does.
    """
    check_text(text)
    return _split_ids(tokenizer, before + text, stop=len(before))[1]


def prefix_text(tokenizer: Tokenizer, prompt: Prompt) -> str:
    """Returns the text in front of a context, to be passed as `before`."""
    for part in prompt.prefix_parts[1::2]:
        check_text(part)
    return "".join(part if n % 2 else control_text(tokenizer, part) for n, part in enumerate(prompt.prefix_parts))


def turn_opened(tokenizer: Tokenizer, prompt: Prompt, ids: Sequence[int]) -> str | None:
    """Returns the spaces that `turn_close` left out, if `ids` end with its text; else None."""
    if not prompt.separator:
        return None
    closed = encode_control(tokenizer, turn_close(prompt))
    ending, end = (tokenizer.text.decode(list(x), skip_special_tokens=False) for x in (ids[-len(closed) - 1 :], closed))
    return prompt.separator[len(turn_close(prompt)) :] if ending.endswith(end) else None


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Returns the text of the last ids, as much as `before` needs."""
    return tokenizer.text.decode(list(ids[-_LEFT:]), skip_special_tokens=False)


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
                yield _split_ids(tokenizer, text[:cut], stop=len(before))[1]
                before, held = text[max(0, cut - _AROUND) : cut], text[cut:]
    if held:
        yield _split_ids(tokenizer, before + held, stop=len(before))[1]


def _split_ids(tokenizer: Tokenizer, text: str, *, stop: int) -> tuple[list[int], list[int], bool]:
    """The ids of tokens within the first `stop` characters, the other ids, and whether a token spans both."""
    encoding = tokenizer.text.encode(text, add_special_tokens=False)
    ids, spans = encoding.ids, encoding.offsets
    if tokenizer.rows is not None and max(ids, default=0) >= tokenizer.rows:
        bad = max(ids)
        raise ValueError(
            f"expected tokens below {tokenizer.rows} (rows of the model's embedding), got "
            f"{tokenizer.control.id_to_token(bad)!r}, token {bad} of a tokenizer that has "
            f"{tokenizer.control.get_vocab_size()}: resize the embedding, or use the model's own tokenizer"
        )
    count = 0
    while count < len(ids) and spans[count][0] < stop and spans[count][1] <= stop:
        count += 1
    return ids[:count], ids[count:], count < len(ids) and spans[count][0] < stop


def _safe_cut(tokenizer: Tokenizer, text: str, begin: int) -> int | None:
    """The last place after `begin` where a cut does not change the tokens before it; None if there is none yet."""
    places = [m.start() for m in re.finditer(r"(?<=\S)\s", text[:-_AROUND]) if m.start() > begin]
    for cut in places[: -_TRIES - 1 : -1]:
        before = text[max(0, cut - _AROUND) : cut]
        alone, longer = (
            tokenizer.text.encode(part, add_special_tokens=False).ids
            for part in (before, before + text[cut : cut + _AROUND])
        )
        if longer[: len(alone)] == alone:
            return cut
    return None
