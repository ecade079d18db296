"""Prompts as data: chat templates split around the context, the repeat prompts, text to ids and back.

Text is text: in a document or a query the string of a control token is encoded as plain characters.
Only a template writes control tokens.
"""

from ..templates import ChatTemplate
from .encoding import (
    encode_context,
    encode_control,
    encode_prefix,
    encode_text,
    encode_turn,
    prefix_text,
    text_of,
    turn_end,
    turn_opened,
)
from .pieces import encode_pieces
from .rendering import QUERY_SEPARATOR, REPEAT_FIRST, REPEAT_NEXT, Prompt, check_text, render, turn_close
from .tokenizer import Tokenizer, control_text, decode, make_tokenizer, token_bytes

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
