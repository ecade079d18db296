"""Chat templates: jinja programs that come with a checkpoint, and the text that they write around a context."""

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

QUERY_SEPARATOR = "\n\n"
_CONTEXT, _SYSTEM, _ANSWER, _NEXT = (f"\ue000{name}\ue001" for name in ("context", "system", "answer", "next"))
_ODD = f"{_CONTEXT} \"<&>'\\\n\n{_NEXT}"  # characters that a template may escape or join
PINNED_DATE = datetime.date(2024, 7, 26)


@dataclass(frozen=True, eq=False)  # hashed by identity, for the cache of `_rendered`
class ChatTemplate:
    """A checkpoint's jinja chat template, its named tokens, and variables for it (`enable_thinking`, `date_string`)."""

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation, split where the context goes: prefix + context + query + postfix.

    `prefix_parts` alternate between the template's text and the caller's (system, instruction). `separator` stands
    between an answer and the next query: it closes one turn and opens another; None for a template of one turn.
    `strips`: the template strips white space around a message, and so at the beginning of a context.
    """

    prefix_parts: tuple[str, ...]
    postfix: str
    separator: str | None
    strips: bool = False

    @property
    def prefix(self) -> str:
        """The whole text in front of the context."""
        return "".join(self.prefix_parts)


def render(template: ChatTemplate, *, system: str | None = None, instruction: str | None = None) -> Prompt:
    """Returns the prompt of one user turn that holds the context, and how later turns follow.

    Without `system`, the template's own default stands. `instruction` opens the user turn, before the context.
    The template itself runs once with and once without a system message, whatever the texts are.

    Raises: ValueError if the template fails, does not write each text once, or changes a text.
    """
    prompt, strips_system = _rendered(template, system is not None)
    parts = list(prompt.prefix_parts)
    if system is not None:
        parts.insert(1, system.strip() if strips_system else system)
    if instruction is not None:
        check_text(instruction)
        parts.append(instruction.strip() + QUERY_SEPARATOR)
    return replace(prompt, prefix_parts=tuple(parts), strips=prompt.strips and instruction is None)


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


def literals(template: ChatTemplate) -> str:
    """Returns the literal texts in a template's source, joined by NUL; empty for a source that is no jinja."""
    try:
        tree = _environment().parse(template.source)
    except TemplateError:
        return ""
    strings = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join([node.data for node in tree.find_all(nodes.TemplateData)] + strings)


def check_text(text: str) -> None:
    """Raises TypeError for a value that is no text, ValueError that says where one has half of a surrogate pair."""
    if not isinstance(text, str):
        raise TypeError(f"expected text (str), got {type(text).__name__}: pass one text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"expected whole characters, got half of a surrogate pair, {text[error.start]!a}, at character "
            f"{error.start}: replace it, as text.encode(errors='replace').decode() does"
        ) from None


@lru_cache(maxsize=16)
def _rendered(template: ChatTemplate, with_system: bool) -> tuple[Prompt, bool]:
    """A prompt without the caller's texts, split where the system message goes, and whether that message is stripped.

    The template runs on marks in place of the texts, and on marks within white space, to see whether it strips them.
    """

    def written(system: str, user: str, *later: tuple[str, str]) -> str:
        turns = [("system", system)] * with_system + [("user", user), *later]
        return _write(template, [{"role": role, "content": text} for role, text in turns])

    prefix, postfix = _split(written(_SYSTEM, _CONTEXT), _CONTEXT)
    padded = written(f"\t{_SYSTEM}\t", " \n" + _ODD)
    if _ODD not in padded:
        raise ValueError(
            "expected the chat template to write what a message says as it is, got one that changes characters of it: "
            "pass another one as chat_template="
        )
    try:
        two_turns = written(_SYSTEM, _CONTEXT, ("assistant", _ANSWER), ("user", _NEXT))
        separator = _split(_split(two_turns, _ANSWER)[1], _NEXT)[0]
    except ValueError:  # a template of one turn
        separator = None
    parts = _split(prefix, _SYSTEM) if with_system else (prefix,)
    prompt = Prompt(parts, postfix, separator, strips=" \n" + _ODD not in padded)
    return prompt, f"\t{_SYSTEM}\t" not in padded


def _split(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise ValueError(
            f"expected the chat template to render each message once, got {mark[1:-1]!r} {text.count(mark)} times: "
            "pass another one as chat_template="
        )
    before, after = text.split(mark)
    return before, after


def _write(template: ChatTemplate, messages: list[dict[str, str]]) -> str:
    """A conversation as the template writes it, with the opening of the next answer."""
    options = dict(template.options)
    date = options.pop("date", PINNED_DATE)
    given = {"tools": None, "documents": None, "enable_thinking": False, "strftime_now": date.strftime}
    given |= {**template.tokens, **options}
    try:
        return _compiled(template.source).render(messages=messages, add_generation_prompt=True, **given)
    except Exception as error:  # a template is a program, which may fail in any way
        raise ValueError(
            f"expected a chat template for a {'/'.join(m['role'] for m in messages)} conversation, got {error}: "
            "leave out system=, or pass another template as chat_template="
        ) from error


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Answers, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _fail, "dict": _Dict(), "namespace": _Namespace}
    return environment


# The tags, variables and functions that Transformers provides.


class _Answers(Extension):
    """`{% generation %}`, which marks a template's answers for training and writes nothing."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own way)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Dict:
    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        return dict(*args, **named)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """jinja's namespace, which refuses names that begin with an underscore."""

    def __init__(*args: Any, **named: Any) -> None:
        Namespace.__init__(*args, **named)
        for name in dict(*args[1:], **named):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise TemplateError(f"namespace attribute {name!r}")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _fail(message: str) -> None:
    raise TemplateError(message)
