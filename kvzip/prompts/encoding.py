"""Text to ids: a document, a query, and what a template writes around them, each behind the text it continues."""

from collections.abc import Sequence

from ..templates import ChatTemplate
from .rendering import Prompt, check_text, render, turn_close
from .tokenizer import Tokenizer, control_text

_LEFT = 16  # tokens that may change how what follows them is encoded


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
    """Returns the ids in front of the context: the template's parts with control tokens, the caller's as plain text.

    Args:
        context: how the context begins. A token that spans the end of the prefix and the beginning of the context
            ("_The", of "[INST] " and "The") belongs to the context.
    """
    before = prefix_text(tokenizer, prompt)
    check_text(context)
    return split_ids(tokenizer, before + context, stop=len(before))[0]


def encode_context(tokenizer: Tokenizer, text: str, *, before: str = "") -> list[int]:
    """Returns the ids of a context behind its prefix; after those of `encode_prefix` they are the ids of both as one
    text.

    Raises: as `encode_text` does.
    """
    check_text(text)
    return split_ids(tokenizer, before + text, stop=len(before))[1]


def prefix_text(tokenizer: Tokenizer, prompt: Prompt) -> str:
    """Returns the text in front of a context, to be passed as `before`."""
    for part in prompt.prefix_parts[1::2]:
        check_text(part)
    return "".join(part if n % 2 else control_text(tokenizer, part) for n, part in enumerate(prompt.prefix_parts))


def turn_opened(tokenizer: Tokenizer, prompt: Prompt, ids: Sequence[int]) -> str | None:
    """Returns the spaces that `turn_close` left out if `ids` end with the text it returns, else None."""
    if not prompt.separator:
        return None
    closed = encode_control(tokenizer, turn_close(prompt))
    ending, end = (tokenizer.text.decode(list(x), skip_special_tokens=False) for x in (ids[-len(closed) - 1 :], closed))
    return prompt.separator[len(turn_close(prompt)) :] if ending.endswith(end) else None


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Returns the text of the last ids, as much as `before` needs."""
    return tokenizer.text.decode(list(ids[-_LEFT:]), skip_special_tokens=False)


def _encode_after(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    """The ids of a text behind `before`, whose own ids are fixed.

    If a token would span both, the text is encoded behind a neutral character instead: alone, a tokenizer might put a
    space in front of it, as at the beginning of a text.
    """
    for left in (before, "\n", "a"):
        _, rest, joined = split_ids(tokenizer, left + text, stop=len(left))
        if not joined:
            return rest
    return split_ids(tokenizer, text, stop=0)[1]


def split_ids(tokenizer: Tokenizer, text: str, *, stop: int) -> tuple[list[int], list[int], bool]:
    """Returns the ids of tokens within the first `stop` characters, the other ids, and whether a token spans both."""
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
