"""Prompts as data: chat templates split around the context, the repeat prompts, text to ids and back.

Text is text: in a document or a query the string of a control token is encoded as plain characters.
Only a template writes control tokens.
"""

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile

from tokenizers import Tokenizer as _Tokenizer

from .templates import ChatTemplate, literals, write

REPEAT_FIRST = "\n\nRepeat the previous context exactly."
REPEAT_NEXT = "\n\nRepeat the part of the previous context exactly, starting with "
QUERY_SEPARATOR = "\n\n"

_CONTEXT, _SYSTEM, _ANSWER, _NEXT = (
    "\ue000context\ue001",
    "\ue000system\ue001",
    "\ue000answer\ue001",
    "\ue000next\ue001",
)


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation, split where the context goes: prefix + context + query + postfix.

    `prefix_parts` alternate between template text and caller's text (system, instruction). `separator` stands
    between an answer and the next query: it closes one turn and opens another; None for a template of one turn.
    `strips`: the template drops white space around what a message says, so a context loses it at its beginning.
    """

    prefix_parts: tuple[str, ...]
    postfix: str
    separator: str | None
    strips: bool = False

    @property
    def prefix(self) -> str:
        """The whole text in front of the context."""
        return "".join(self.prefix_parts)


@dataclass(frozen=True)
class Tokenizer:
    """One vocabulary, in which the caller's text and a template's can be told apart.

    `control` spells control tokens as the checkpoint does. `text` spells each between two copies of `mark`, random
    characters of Unicode's private use that no document can know; otherwise it is the same. So a template's text with
    its control tokens spelled that way, and the caller's text as it is, are encoded together, as one text.

    `bos_ids` come in front of a text without a template. `rows` are those of the embedding, where it has fewer than
    there are tokens.
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
    """Returns a tokenizer that follows `control`, whose control tokens are the special ones and those that the chat
    template writes (as `<think>`).

    Args:
        rows: of the embedding; None for as many as there are tokens.
    """
    document = json.loads(control.to_str())
    written = literals(template) if template else ""
    tokens = [t for t in document["added_tokens"] if t["special"] or (_is_written(t["content"], written))]
    mark = "".join(chr(0xE000 + secrets.randbelow(0x1900)) for _ in range(4))
    spelled = {token["content"]: mark + token["content"] + mark for token in tokens}
    kept = control.normalizer is None or control.normalizer.normalize_str(mark) == mark
    words = {re.escape(token["content"]) for token in tokens if token["single_word"]}
    for token in tokens:
        token["content"] = spelled[token["content"]]
        token["single_word"] = False  # which `names` sees to: between marks there is no other word
        # a normalizer that puts a space in front makes Transformers miss most, one that drops marks would take letters
        token["normalized"] = token["normalized"] and kept
    model = document["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {spelled.get(name, name): i for name, i in model["vocab"].items()}
    else:
        model["vocab"] = [[spelled.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") in spelled:
        model["unk_token"] = spelled[model["unk_token"]]
    if "merges" in model:  # text must not be joined to a control token either
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
    """Whether a template writes a token, which a word (as "role", by which it reads a message) does not show."""
    return content in written and not re.fullmatch(r"\s*\w*\s*", content)


def render(template: ChatTemplate, *, system: str | None = None, instruction: str | None = None) -> Prompt:
    """Returns the prompt of one user turn that holds the context, and how later turns follow.

    Without `system`, the template's own default stands. `instruction` opens the user turn, before the context.

    Raises: ValueError if the template fails, does not put the texts where they can be found, or changes them.
    """
    start = [] if system is None else [{"role": "system", "content": _SYSTEM}]
    turn = {"role": "user", "content": _CONTEXT}
    first = write(template, [*start, turn])
    prefix, postfix = _split(first, _CONTEXT)
    talk = [*start, turn, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}]
    try:
        separator = _split(_split(write(template, talk), _ANSWER)[1], _NEXT)[0]
    except ValueError:
        separator = None
    if system is None:
        parts = [prefix]
    else:
        before, after = _split(prefix, _SYSTEM)
        padded = write(template, [{"role": "system", "content": f" {_SYSTEM} "}, turn])
        parts = [before, system if f" {_SYSTEM} " in padded else system.strip(), after]
    if instruction is not None:
        check_text(instruction)
        parts += [instruction.strip() + QUERY_SEPARATOR]
    strips = _strips(template, start) and instruction is None
    return Prompt(prefix_parts=tuple(parts), postfix=postfix, separator=separator, strips=strips)


def _strips(template: ChatTemplate, start: list[dict[str, str]]) -> bool:
    """Whether the template strips what a message says. Raises ValueError if it changes it in another way."""
    said = f"{_CONTEXT} \"<&>'\\\n\n{_NEXT}"
    found = write(template, [*start, {"role": "user", "content": " \n" + said}])
    if said not in found:
        raise ValueError(
            "expected the chat template to write what a message says as it is, got one that changes characters of it: "
            "pass another one as chat_template="
        )
    return " \n" + said not in found


def _split(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise ValueError(
            f"expected the chat template to render each message once, got {mark[1:-1]!r} {text.count(mark)} times: "
            "pass another one as chat_template="
        )
    before, after = text.split(mark)
    return before, after


def turn_end(tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    """Returns the control token that the template puts behind an answer, if it puts one there."""
    try:
        after = (render(template).separator or "").lstrip() if template else ""
    except ValueError:  # one that this model's answers do not wait for
        return []
    found = tokenizer.names.match(after)
    end = tokenizer.control.token_to_id(found[0]) if found else None
    return [] if end is None else [end]


def encode_text(tokenizer: Tokenizer, text: str, *, before: str = "") -> list[int]:
    """Returns the ids of a document or a query; nothing in it becomes a control token.

    Args:
        before: what the text continues, as `text_of` and `control_text` spell it. Its own tokens stay as they are.

    Raises: ValueError for half of a surrogate pair, or a token that the model's embedding has no row for.
    """
    check_text(text)
    return _encode_after(tokenizer, before, text)


def encode_control(tokenizer: Tokenizer, text: str, *, before: str = "") -> list[int]:
    """Returns the ids of text that a template wrote, as `encode_text` does."""
    return _encode_after(tokenizer, before, control_text(tokenizer, text))


def encode_turn(tokenizer: Tokenizer, text: str, after: str, *, before: str = "") -> list[int]:
    """Returns the ids of the caller's text and of what the template writes after it, as `encode_text` does."""
    check_text(text)
    return _encode_after(tokenizer, before, text + control_text(tokenizer, after))


def encode_prefix(tokenizer: Tokenizer, prompt: Prompt, *, context: str = "") -> list[int]:
    """Returns the ids in front of the context: the template's parts with control tokens, the caller's as text.

    Args:
        context: how the context begins. A token that holds the prefix's end and the context's beginning (of "[INST] "
            and "The": "_The") is the context's.
    """
    before = prefix_text(tokenizer, prompt)
    check_text(context)
    return _encode(tokenizer, before + context, stop=len(before))[0]


def encode_context(tokenizer: Tokenizer, text: str, *, before: str = "") -> list[int]:
    """Returns the ids of a context behind its prefix: with those of `encode_prefix` they are the whole text's.

    Raises: as `encode_text` does.
    """
    check_text(text)
    return _encode(tokenizer, before + text, stop=len(before))[1]


def prefix_text(tokenizer: Tokenizer, prompt: Prompt) -> str:
    """Returns what is in front of a context, to be passed as `before`."""
    for part in prompt.prefix_parts[1::2]:
        check_text(part)
    spell = (lambda text: control_text(tokenizer, text), lambda text: text)
    return "".join(spell[n % 2](part) for n, part in enumerate(prompt.prefix_parts))


def control_text(tokenizer: Tokenizer, text: str) -> str:
    """Returns a template's text with its control tokens spelled so that they are known among other text."""
    return tokenizer.names.sub(lambda found: tokenizer.mark + found[0] + tokenizer.mark, text)


def turn_close(prompt: Prompt) -> str:
    """Returns what closes an answer's turn and opens the next, without the spaces at its end: most vocabularies join
    them with the word that follows, so they are encoded with it (see `turn_opened`).

    Raises: ValueError for a template of one turn.
    """
    if prompt.separator is None:
        raise ValueError(
            "expected a chat template that renders a second turn, got one that does not: ask with template=False, or "
            "pass another one as chat_template="
        )
    return prompt.separator.rstrip(" ")


def turn_opened(tokenizer: Tokenizer, prompt: Prompt, ids: Sequence[int]) -> str | None:
    """Returns the spaces that `turn_close` left out, where `ids` end with it; None where they do not."""
    if not prompt.separator:
        return None
    closed = encode_control(tokenizer, turn_close(prompt))
    ending, end = (tokenizer.text.decode(list(x), skip_special_tokens=False) for x in (ids[-len(closed) - 1 :], closed))
    return prompt.separator[len(turn_close(prompt)) :] if ending.endswith(end) else None


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Returns the text of the last of these ids, enough of it to be passed as `before`."""
    return tokenizer.text.decode(list(ids[-_LEFT:]), skip_special_tokens=False)


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[str], *, before: str = "") -> Iterator[list[int]]:
    """Yields the ids of a text that comes in pieces; all together they are those of the whole text behind `before`.

    About 64 KiB are encoded at a time. The text is cut in front of white space, where the tokens of the last
    characters before the cut stay the same whether or not the next characters follow, and what comes next is encoded
    with those characters in front of it. So a tokenizer that merges no further than that is followed exactly; text
    without such a place is held until one comes.
    """
    held = ""
    for piece in pieces:
        check_text(piece)
        for at in range(0, len(piece), _BLOCK):
            held += piece[at : at + _BLOCK]
            cut = _safe_cut(tokenizer, before + held, len(before)) if len(held) >= _BLOCK else None
            if cut is not None:
                text = before + held
                yield _encode(tokenizer, text[:cut], stop=len(before))[1]
                before, held = text[max(0, cut - _AROUND) : cut], text[cut:]
    if held:
        yield _encode(tokenizer, before + held, stop=len(before))[1]


_BLOCK, _AROUND, _TRIES = 1 << 16, 64, 16  # characters, characters, cuts
_LEFT = 16  # tokens that may change how what follows them is encoded


def _safe_cut(tokenizer: Tokenizer, text: str, start: int) -> int | None:
    """The last place after `start` where the text may be cut, with text enough after it to know."""
    places = [m.start() for m in re.finditer(r"(?<=\S)\s", text[:-_AROUND]) if m.start() > start]
    for cut in places[: -_TRIES - 1 : -1]:
        before = text[max(0, cut - _AROUND) : cut]
        alone = tokenizer.text.encode(before, add_special_tokens=False).ids
        if (
            tokenizer.text.encode(before + text[cut : cut + _AROUND], add_special_tokens=False).ids[: len(alone)]
            == alone
        ):
            return cut
    return None


def _encode_after(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    """The ids of a text behind another whose tokens are made already.

    Where the whole text has a token that holds characters of both, it is encoded behind a character that does not join
    with it instead, so that no space is put in front as of a text's beginning.
    """
    for left in (before, "\n", "a"):
        _, rest, joined = _encode(tokenizer, left + text, stop=len(left))
        if not joined:
            return rest
    return _encode(tokenizer, text, stop=0)[1]


def _encode(tokenizer: Tokenizer, text: str, *, stop: int) -> tuple[list[int], list[int], bool]:
    """The ids of tokens within the first `stop` characters, those of the others, and whether one is in both."""
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


def check_text(text: str) -> None:
    """Raises TypeError for what is no text, ValueError that says where one has half of a surrogate pair."""
    if not isinstance(text, str):
        raise TypeError(f"expected text (str), got {type(text).__name__}: pass one text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"expected whole characters, got half of a surrogate pair, {text[error.start]!a}, at character "
            f"{error.start}: replace it, as text.encode(errors='replace').decode() does"
        ) from None


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Returns the text of ids, without control tokens."""
    return tokenizer.control.decode(ids, skip_special_tokens=True)


def token_bytes(tokenizer: Tokenizer, ids: Iterable[int]) -> list[bytes]:
    """Returns the UTF-8 of each token as `tokenizers` decodes it within a text; control tokens as they are written.

    A token that holds a part of a character gives its bytes: joined with those of its neighbors they are the text.
    """
    vocabulary, decoder = tokenizer.control, tokenizer.control.decoder
    result = []
    for i in ids:
        name = vocabulary.id_to_token(i) or ""
        # behind a letter, since some decoders drop the space in front of a text
        text = name if decoder is None else decoder.decode(["a", name])[1:]
        partial = _raw_bytes(name) if "\ufffd" in text else None
        result.append(text.encode() if partial is None else partial)
    return result


def _raw_bytes(name: str) -> bytes | None:
    """The bytes that a token's name in the vocabulary spells, one way or the other; None if it spells characters."""
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
