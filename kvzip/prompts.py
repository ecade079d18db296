"""Prompts as data: chat templates split around the context, the repeat prompts, text to ids and back.

Text is text: in a document or a query the string of a control token is encoded as plain characters.
Only a template writes control tokens.
"""

import datetime
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as _Tokenizer

REPEAT_FIRST = "\n\nRepeat the previous context exactly."
REPEAT_NEXT = "\n\nRepeat the part of the previous context exactly, starting with "
QUERY_SEPARATOR = "\n\n"
PINNED_DATE = datetime.date(2024, 7, 26)

_CONTEXT, _SYSTEM, _ANSWER, _NEXT = (
    "\ue000context\ue001",
    "\ue000system\ue001",
    "\ue000answer\ue001",
    "\ue000next\ue001",
)


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's jinja chat template, its named tokens, and variables for it (`enable_thinking`, `date_string`)."""

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation, split where the context goes: prefix + context + query + postfix.

    `prefix_parts` alternate between template text and caller's text (system, instruction). `separator` stands
    between an answer and the next query: it closes one turn and opens another.
    """

    prefix_parts: tuple[str, ...]
    postfix: str
    separator: str

    @property
    def prefix(self) -> str:
        """The whole text in front of the context."""
        return "".join(self.prefix_parts)


@dataclass(frozen=True)
class Tokenizer:
    """One vocabulary, two ways in: `text` takes every character as text, `control` knows control tokens."""

    text: _Tokenizer
    control: _Tokenizer
    bos_ids: tuple[int, ...]


def render(template: ChatTemplate, *, system: str | None = None, instruction: str | None = None) -> Prompt:
    """Returns the prompt of one user turn that holds the context, and how later turns follow.

    Without `system`, the template's own default stands. `instruction` opens the user turn, before the context.

    Raises: ValueError if the template fails, or does not put the texts where they can be found.
    """
    start = [] if system is None else [{"role": "system", "content": _SYSTEM}]
    turn = {"role": "user", "content": _CONTEXT}
    first = _render(template, [*start, turn])
    prefix, postfix = _split(first, _CONTEXT)
    talk = [*start, turn, {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}]
    separator = _split(_split(_render(template, talk), _ANSWER)[1], _NEXT)[0]
    if system is None:
        parts = [prefix]
    else:
        before, after = _split(prefix, _SYSTEM)
        parts = [before, system, after]
    if instruction is not None:
        parts += [instruction.strip() + QUERY_SEPARATOR]
    return Prompt(prefix_parts=tuple(parts), postfix=postfix, separator=separator)


def _split(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise ValueError(
            f"expected the chat template to render each message once, got {mark[1:-1]!r} {text.count(mark)} times: "
            "pass another one as chat_template="
        )
    before, after = text.split(mark)
    return before, after


def _render(template: ChatTemplate, messages: list[dict[str, str]]) -> str:
    options = dict(template.options)
    date = options.pop("date", PINNED_DATE)

    def fail(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals |= {"raise_exception": fail, "strftime_now": lambda form: date.strftime(form)}
    variables = {"enable_thinking": False, **template.tokens, **options}
    try:
        return environment.from_string(template.source).render(
            messages=messages, add_generation_prompt=True, **variables
        )
    except TemplateError as error:
        raise ValueError(
            f"expected a chat template for a {'/'.join(m['role'] for m in messages)} conversation, got {error}: "
            "leave out system=, or pass another template as chat_template="
        ) from error


def read_template(
    directory: Path, *, source: str | None = None, options: Mapping[str, Any] | None = None
) -> ChatTemplate | None:
    """Returns the chat template of an HF directory, or `source` in its place; None where there is neither."""
    config = read_json(directory / "tokenizer_config.json")
    source = source or _template_source(directory, config)
    if not source:
        return None
    return ChatTemplate(source=source, tokens=named_tokens(config), options=dict(options or {}))


def _template_source(directory: Path, config: Mapping[str, Any]) -> str | None:
    if (directory / "chat_template.jinja").exists():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    return source if source is not None else read_json(directory / "chat_template.json").get("chat_template")


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns `bos_token`, `eos_token`, ... of a tokenizer_config.json, which writes them as text or as a dict."""
    found = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found


def read_tokenizer(directory: Path, template: ChatTemplate | None) -> Tokenizer | None:
    """Returns the tokenizer of an HF directory, or None where it has no tokenizer.json.

    Control tokens are the special ones and those that the chat template itself writes (as `<think>`).
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    document = json.loads(path.read_text(encoding="utf-8"))
    control = _Tokenizer.from_str(json.dumps(document))
    written = template.source if template else ""
    for token in document.get("added_tokens", []):
        content = token["content"]
        token["special"] = token["special"] or (bool(content.strip()) and content in written)
    text = _Tokenizer.from_str(json.dumps(document))
    text.encode_special_tokens = True
    bos = control.token_to_id(named_tokens(read_json(directory / "tokenizer_config.json")).get("bos_token", ""))
    around = control.encode("", add_special_tokens=True).ids
    return Tokenizer(text=text, control=control, bos_ids=tuple(i for i in around if i == bos))


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a document or a query; nothing in it becomes a control token."""
    return tokenizer.text.encode(text, add_special_tokens=False).ids


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[str]) -> Iterator[list[int]]:
    """Yields the ids of a text that comes in pieces; all together they are those of the whole text.

    About 64 KiB are encoded at a time. The text is cut in front of white space, where the tokens of the last
    characters before the cut stay the same whether or not the next characters follow, and what comes next is encoded
    with those characters in front of it. So a tokenizer that merges no further than that is followed exactly; text
    without such a place is held until one comes.
    """
    before, held = "", ""
    for piece in pieces:
        for at in range(0, len(piece), _BLOCK):
            held += piece[at : at + _BLOCK]
            cut = _safe_cut(tokenizer, before + held, len(before)) if len(held) >= _BLOCK else None
            if cut is not None:
                text = before + held
                yield _encode_after(tokenizer, before, text[len(before) : cut])
                before, held = text[max(0, cut - _AROUND) : cut], text[cut:]
    if held:
        yield _encode_after(tokenizer, before, held)


_BLOCK, _AROUND, _TRIES = 1 << 16, 64, 16  # characters, characters, cuts


def _safe_cut(tokenizer: Tokenizer, text: str, start: int) -> int | None:
    """The last place after `start` where the text may be cut, with text enough after it to know."""
    places = [m.start() for m in re.finditer(r"(?<=\S)\s", text[:-_AROUND]) if m.start() > start]
    for cut in places[: -_TRIES - 1 : -1]:
        before = text[max(0, cut - _AROUND) : cut]
        alone = encode_text(tokenizer, before)
        if encode_text(tokenizer, before + text[cut : cut + _AROUND])[: len(alone)] == alone:
            return cut
    return None


def _encode_after(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    return encode_text(tokenizer, before + text)[len(encode_text(tokenizer, before)) :]


def encode_control(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of text that a template wrote."""
    return tokenizer.control.encode(text, add_special_tokens=False).ids


def encode_prefix(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Returns the ids in front of the context: the template's parts with control tokens, the caller's as text."""
    encoders = (encode_control, encode_text)
    return [i for n, part in enumerate(prompt.prefix_parts) for i in encoders[n % 2](tokenizer, part)]


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


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object of a JSON file, empty where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
