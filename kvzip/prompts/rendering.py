"""A chat template as text around the context: what stands in front, behind, and between two turns."""

from dataclasses import dataclass, replace
from functools import lru_cache

from ..templates import ChatTemplate, write

REPEAT_FIRST = "\n\nRepeat the previous context exactly."
REPEAT_NEXT = "\n\nRepeat the part of the previous context exactly, starting with "
QUERY_SEPARATOR = "\n\n"

_CONTEXT, _SYSTEM, _ANSWER, _NEXT = (f"\ue000{name}\ue001" for name in ("context", "system", "answer", "next"))
_ODD = f"{_CONTEXT} \"<&>'\\\n\n{_NEXT}"  # characters that a template may escape or join


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation, split where the context goes: prefix + context + query + postfix.

    `prefix_parts` alternate between the template's text and the caller's (system, instruction). `separator` stands
    between an answer and the next query: it closes one turn and opens another; None for a template of one turn.
    `strips`: the template removes white space around a message, so a context loses it at its beginning.
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
    """A prompt without the caller's texts, split where the system message goes, and whether that one is stripped.

    The template runs on marks in place of the texts, and on padded marks, which show whether it strips them.
    """
    start = [{"role": "system", "content": _SYSTEM}] if with_system else []
    padded_start = [{"role": "system", "content": f"\t{_SYSTEM}\t"}] if with_system else []
    turn = {"role": "user", "content": _CONTEXT}
    prefix, postfix = _split(write(template, [*start, turn]), _CONTEXT)
    padded = write(template, [*padded_start, {"role": "user", "content": " \n" + _ODD}])
    if _ODD not in padded:
        raise ValueError(
            "expected the chat template to write what a message says as it is, got one that changes characters of it: "
            "pass another one as chat_template="
        )
    later = [{"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _NEXT}]
    try:
        separator = _split(_split(write(template, [*start, turn, *later]), _ANSWER)[1], _NEXT)[0]
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
