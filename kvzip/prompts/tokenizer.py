"""The tokenizer with its marks: a vocabulary in which the caller's text cannot spell a control token."""

import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import takewhile

from tokenizers import Tokenizer as _Tokenizer

from ..templates import ChatTemplate, literals


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary in two spellings, so that only a template can write control tokens.

    `control` spells control tokens as the checkpoint does. `text` is the same vocabulary, but spells each control token
    between two copies of `mark`, random characters of Unicode's private use that no document can know. `control_text`
    spells a template's text that way; joined to the caller's text as it is, both are encoded as one text.

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
    tokens = [t for t in document["added_tokens"] if t["special"] or _is_written(t["content"], written)]
    mark = "".join(chr(0xE000 + secrets.randbelow(0x1900)) for _ in range(4))
    spelled = {token["content"]: mark + token["content"] + mark for token in tokens}
    kept = control.normalizer is None or control.normalizer.normalize_str(mark) == mark
    words = {re.escape(token["content"]) for token in tokens if token["single_word"]}
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
    longest_first = [re.escape(name) for name in sorted(spelled, key=len, reverse=True)]
    longest_first = [rf"(?<!\w){name}(?!\w)" if name in words else name for name in longest_first]
    around = control.encode("a", add_special_tokens=True)
    in_front = len(list(takewhile(bool, around.special_tokens_mask)))
    return Tokenizer(
        text=_Tokenizer.from_str(json.dumps(document | {"post_processor": None})),
        control=control,
        bos_ids=tuple(around.ids[:in_front]),
        mark=mark,
        names=re.compile("|".join(longest_first) or "(?!)"),
        rows=rows if rows is not None and rows < control.get_vocab_size() else None,
    )


def _is_written(content: str, written: str) -> bool:
    """Whether a template writes a token. A plain word in its source, such as "role", may be a key that it reads."""
    return content in written and not re.fullmatch(r"\s*\w*\s*", content)


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
