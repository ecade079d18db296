"""Chat templates: jinja programs that come with a checkpoint, run with the functions that Transformers provides."""

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

PINNED_DATE = datetime.date(2024, 7, 26)


@dataclass(frozen=True, eq=False)  # compared by identity: `prompts.render` keeps what it made of each
class ChatTemplate:
    """A checkpoint's jinja chat template, its named tokens, and variables for it (`enable_thinking`, `date_string`)."""

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def write(template: ChatTemplate, messages: list[dict[str, str]]) -> str:
    """Returns a conversation as the template writes it, with the opening of the next answer.

    Raises: ValueError for a template that fails.
    """
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


def literals(template: ChatTemplate) -> str:
    """Returns the literal texts in a template's source, joined by NUL; empty for a source that is no jinja."""
    try:
        tree = _environment().parse(template.source)
    except TemplateError:
        return ""
    strings = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join([node.data for node in tree.find_all(nodes.TemplateData)] + strings)


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
    """jinja's, without names that begin with an underscore."""

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
