"""Messages of a conversation as the token ids that follow a document, or stand alone."""

import torch
from jaxtyping import Int64
from torch import Tensor

from .. import inputs, prompts
from ..cache import RaggedCache
from ..inputs import lone_query_ids, prefix_ids, prompt_of, query_ids, tokenizer_of
from ..models import Model
from ..options import Turn
from .errors import ApiError
from .schemas import Message


def conversation_ids(model: Model, document: RaggedCache | None, messages: list[Message]) -> Int64[Tensor, " S"]:
    """Returns the ids of a conversation, without those of the document in front of it, up to where an answer begins.

    The first user turn continues the document's; later ones follow by the template, as `kvzip.ask` puts them.

    Raises: ApiError for messages in another order, a system message that is not the document's, or turns that the
        template cannot write; ValueError as `query_ids` does.
    """
    system, turns = _split(messages)
    first, later = turns[0], turns[1:]
    if document is None:
        ids = _alone(model, first, system, bool(later))
    else:
        _check_system(model, document, system)
        if later and not document.chat:
            raise ApiError(400, "expected one user message about a document without a chat template", param="messages")
        text = first if document.chat else prompts.QUERY_SEPARATOR + first
        ids = query_ids(model, document, [text], template=document.chat)[0]
    if not later:
        return torch.tensor(ids)
    tokenizer, prompt = tokenizer_of(model), prompt_of(model)
    try:
        close = prompts.turn_close(prompt)
    except ValueError as error:
        raise ApiError(400, f"expected one user message, got several: {error}", param="messages") from error
    opening = (prompt.separator or "")[len(close) :]
    for answer, query in zip(later[::2], later[1::2], strict=True):  # `ids` ends with the question in front
        ids += prompts.encode_text(tokenizer, answer, before=prompts.text_of(tokenizer, ids)) if answer else []
        ids += prompts.encode_control(tokenizer, close, before=prompts.text_of(tokenizer, ids))
        before = prompts.text_of(tokenizer, ids)
        ids += prompts.encode_turn(tokenizer, opening + query.strip(), prompt.postfix, before=before)
    return torch.tensor(ids)


def _split(messages: list[Message]) -> tuple[str | None, list[str]]:
    """The system message, and the texts of user and assistant in turn, the user's first and last."""
    system = messages[0].text if messages[0].role in ("system", "developer") else None
    rest = messages if system is None else messages[1:]
    roles = [message.role for message in rest]
    if not rest or len(rest) % 2 == 0 or any(r != ("user", "assistant")[n % 2] for n, r in enumerate(roles)):
        raise ApiError(
            400,
            "expected at most one system message, then user and assistant in turn, the user first and last, got "
            f"{', '.join(message.role for message in messages[:9])}",
            param="messages",
        )
    empty = [n for n, message in enumerate(rest) if message.role == "user" and not message.text.strip()]
    if empty:
        raise ApiError(
            400, f"expected user messages with text in them, got none in message {empty[0]}", param="messages"
        )
    return system, [message.text for message in rest]


def _alone(model: Model, query: str, system: str | None, several: bool) -> list[int]:
    if model.template is None and (system is not None or several):
        raise ApiError(400, "expected one user message, got more for a model without a chat template", param="messages")
    turn = Turn(system=system, template=model.template is not None)
    return lone_query_ids(model, query, template=model.template is not None, turn=turn)


def _check_system(model: Model, document: RaggedCache, system: str | None) -> None:
    """Raises ApiError for a system message that the document was not read with."""
    if system is None:
        return
    held = document.token_ids[: document.start].tolist()
    if not document.chat or prefix_ids(model, inputs.Turn(system=system)) != held:
        raise ApiError(
            400,
            "expected no system message, or the one that the document was compressed with, got another: it is part of "
            "what was compressed; give it when the document is (system)",
            param="messages",
        )
