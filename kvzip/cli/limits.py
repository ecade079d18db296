"""What `kvzip compress` makes sure of before the work: positions, memory, and room for the heads that stay whole."""

import torch
from torch import Tensor

from .. import cache
from ..cache import DenseCache
from ..models import Model
from ..options import Budget
from ..scoring import repeats
from .output import size

SEGMENT = 16_000  # the largest that errors advise


def segment_for(tokens: int) -> int | None:
    """Returns a segment, in thousands, of which a document has several; None for a document too short for that."""
    return min(SEGMENT, tokens // 2 // 1000 * 1000) or None


def check_length(
    model: Model, prefix: list[int], ids: Tensor, *, made_for: int | None, chunk: int | None, chat: bool
) -> None:
    """Raises ValueError now, not after the prefill, if document and scoring need more positions than there are.

    Args:
        made_for: positions that the model was made for, of which --max-length may leave fewer.
        chunk: tokens of a repeat pass, None for no scoring pass.
        chat: whether the repeats follow the chat template.
    """
    if len(ids) == 0:
        return
    length = len(prefix) + len(ids)
    needed, limit = length, model.config.max_length
    if chunk is not None:
        token_ids = torch.cat([torch.tensor(prefix, dtype=torch.long), ids])
        bare: DenseCache = DenseCache([], length, len(prefix), chat, token_ids, model.fingerprint)
        needed += max(len(repeat) for _, _, repeat in repeats(model, bare, chunk=chunk, hint=8))
    if needed <= limit:
        return
    scored = f" and {needed - length:,} to score it (--chunk makes them fewer)" if needed > length else ""
    remedy = (
        "shorten it, or pass RoPE scaling (--rope, and --max-length); --segment does not help, nor does a longer "
        "--max-length alone: the model knows no more positions"
    )
    if made_for is not None and limit < needed <= made_for:
        remedy = f"pass a longer --max-length, or none: the model was made for {made_for:,}"
    whose = "the model's length" if model.max_length is None else "--max-length"
    raise ValueError(
        f"expected a document that fits in {limit:,} positions ({whose}), got {length:,} tokens{scored}: {remedy}"
    )


def check_memory(model: Model, needed: int, tokens: int) -> None:
    """Raises MemoryError now if the full cache has no room: a host notices late, and then ends the process."""
    free = cache.free_bytes(model.device)
    if free is None or needed <= free:
        return
    useful = segment_for(tokens)
    remedy = [f"--segment {useful} never holds all of it"] if useful else []
    remedy += ["--dtype bfloat16 takes half"] if model.dtype.itemsize > 2 else []
    raise MemoryError(
        f"expected a document whose cache fits in memory, got {tokens:,} tokens that take {size(needed)} of "
        f"{size(free)} free: {', '.join([*remedy, 'a shorter document takes less'])}"
    )


def whole_heads(heads: int, tokens: int, budget: Budget, sink: int, recent: int) -> int:
    """Returns how many of the heads can stay whole.

    The ratio (or budget) is of all pairs: what the other heads keep of the beginning and the end is within it, where
    `kvzip.compress` takes it on top.

    Raises: ValueError if the ends alone are more than the ratio.
    """
    assert budget.budget is not None or budget.ratio is not None  # a threshold does not go with --heads
    room = budget.budget if budget.budget is not None else (budget.ratio or 0) * tokens  # tokens a head, on average
    ends = min(tokens, sink + recent)
    if ends > room:
        raise ValueError(
            f"expected room for the first {sink} and the last {recent} tokens in every head, which are "
            f"{ends / tokens:.1%} of {tokens:,} tokens, got room for {room / tokens:.1%}: keep more (-r), or lower "
            "--sink and --recent"
        )
    return heads if room >= tokens else int(heads * (room - ends) / (tokens - ends) + 1e-9)
