"""Turns a context, passed whole or in pieces of text or ids, into segments of ids."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from .. import prompts
from ..checks import check_text_or_ids
from ..inputs import OPENING, context_ids, tokenizer_of
from ..models import Model

Pieces = Iterable[str] | Iterable[Tensor]
"""A context in pieces: all text, or all token ids."""


def opening_of(context: str | Tensor | Pieces, *, strips: bool) -> tuple[Any, str]:
    """The context, and how its text begins; both without leading white space if the template strips it."""
    if isinstance(context, Tensor):
        return context, ""
    if isinstance(context, str):
        context = context.lstrip() if strips else context
        return context, context[:OPENING]
    pieces, seen, opening = iter(context), [], ""
    for piece in pieces:
        if strips and not opening and isinstance(piece, str):
            piece = piece.lstrip()
        seen.append(piece)
        if not isinstance(piece, str):
            break
        opening += piece[:OPENING]
        if len(opening) >= OPENING:
            break
    return itertools.chain(seen, pieces), opening[:OPENING]


def ids_of(
    model: Model, context: str | Tensor | Pieces, *, before: str
) -> tuple[Iterator[Int64[Tensor, " S"]], int | None]:
    """The ids of a context, piece by piece, and their number; None if it is unknown before the last piece."""
    if isinstance(context, (str, Tensor)):
        ids = context_ids(model, context, before=before)
        return iter([ids]), len(ids)
    pieces = iter(context)
    first = next(pieces, "")
    pieces = itertools.chain([first], pieces)
    if isinstance(first, str):
        encoded = prompts.encode_pieces(tokenizer_of(model), _all(pieces, str), before=before)
        return (torch.tensor(ids, dtype=torch.long) for ids in encoded), None
    return (context_ids(model, piece) for piece in _all(pieces, Tensor)), None


def _all(pieces: Iterator[Any], kind: type) -> Iterator[Any]:
    for piece in pieces:
        if not isinstance(piece, kind):
            raise TypeError(
                f"expected pieces that are all {kind.__name__}, got {type(piece).__name__}: pass text or tensors of ids"
            )
        check_text_or_ids(piece, "a piece")
        yield piece


def segments_of(
    pieces: Iterator[Int64[Tensor, " S"]], size: int, done: Int64[Tensor, " S"]
) -> Iterator[Int64[Tensor, " S"]]:
    """Yields segments of `size` tokens (the last may be shorter) of the tokens after `done`, those of the checkpoint.

    Raises: ValueError if the pieces do not begin with `done`, or go on after a `done` whose last segment was shorter.
    """
    held: list[Tensor] = []
    count, position = 0, 0
    for piece in pieces:
        old = min(len(piece), len(done) - position)
        if not torch.equal(piece[:old], done[position : position + old]):
            raise ValueError("expected the context that the checkpoint was begun with, got other tokens: use its own")
        position += old
        held.append(piece[old:])
        count += len(piece) - old
        if count and len(done) % size:
            raise ValueError("expected the context to end where the checkpoint does, got more tokens: use its own")
        if count >= size:
            ready = torch.cat(held)
            whole = count // size * size
            yield from ready[:whole].split(size)
            held, count = [ready[whole:]], count - whole
    if position < len(done):
        raise ValueError(
            f"expected at least the {len(done)} context tokens that the checkpoint holds, got {position}: use its own"
        )
    if count:
        yield torch.cat(held)
