"""Questions over one context alone: each has a slot of a batch of tails, and all are read and answered side by side."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from ..attention import decode_attend
from ..cache import RaggedCache, RaggedKV, Tail, all_ragged
from ..cache.caches import roomy_tail
from ..models import Model, forward
from ..ops import TailTensors
from .choosing import NO_TOKEN
from .sequences import Part
from .steps import Packed

_ROWS_OF_A_GRAPH = 4096  # questions x tokens; larger passes are bound by matmuls, not by launches
_MULTIPLE = 32  # of tokens that questions are padded to, so that one graph serves many lengths


@dataclass(frozen=True)
class Alone:
    """A reader of sequences over one context. See `steps.Reader`.

    The context's addresses and how it is split over the device are part of a graph, so that no step plans anew. Every
    sequence that goes on must be in every step: what a step does to the tail of a slot that it leaves out is undefined.

    Args:
        past: tokens of the cache's own tail, which come first in each question's.
        rows: that each tail has room for, besides.
    """

    model: Model
    layers: tuple[RaggedKV, ...]
    tail: Tail
    start: int
    past: int
    rows: int

    def pack(self, parts: list[Part], *, padded: bool) -> Packed:
        """A step's numbers: of each slot its length, by how much that grows, how many tokens; then tokens or NO_TOKEN.

        Questions are padded on the right: what a pad writes is overwritten by the next token, and no query sees it.
        """
        slots = [part.sequence.slot for part in parts]
        batch, longest = len(self.tail.lengths), max(len(part.tokens) for part in parts)
        replayed = padded and batch * longest <= _ROWS_OF_A_GRAPH
        if replayed and longest > 1:
            longest = min(-(-longest // _MULTIPLE) * _MULTIPLE, self.rows)
        if not padded:
            batch = max(slots) + 1
        each = np.zeros((3, batch), dtype=np.int32)
        each[[0, 2]] = [[self.past], [1]]  # a slot without a sequence writes behind the cache's own tail
        each[:, slots] = [[part.first for part in parts], [longest == 1] * len(parts), [len(p.tokens) for p in parts]]
        tokens = np.zeros((batch, longest), dtype=np.int32)
        for slot, part in zip(slots, parts, strict=True):
            tokens[slot, : len(part.tokens)] = part.tokens
        numbers = np.concatenate([each.reshape(-1), tokens.reshape(-1)])
        grows = (slice(0, batch), slice(batch, 2 * batch))
        return Packed(numbers, (batch, longest), batch, slots, grows, replayed)

    def hidden(
        self, numbers: Int32[Tensor, " I"], shape: tuple[int, int], last: Int64[Tensor, " S"]
    ) -> tuple[Float[Tensor, "M H"], Int64[Tensor, " M"]]:
        """Appends the tokens to their tails; returns the hidden state of each slot's last one, and the slots."""
        batch, tokens = shape
        lengths, _, counts = numbers[: 3 * batch].view(3, batch)
        ids = numbers[3 * batch :].view(batch, tokens)
        ids = torch.where(ids == NO_TOKEN, last[:batch, None], ids)
        hidden = self.read(ids, lengths)
        slots = torch.arange(batch, device=numbers.device)
        return hidden[:, 0] if tokens == 1 else hidden[slots, counts.long() - 1], slots

    def read(self, ids: Int64[Tensor, "B T"], lengths: Int32[Tensor, " B"]) -> Float[Tensor, "B T M"]:
        """Appends T tokens to the first B tails, which have `lengths` rows, and returns their hidden states."""
        batch = len(ids)
        k, v = (tuple(x[:batch] for x in rows) for rows in (self.tail.k, self.tail.v))
        after = torch.arange(self.start, self.start + ids.shape[1], device=ids.device)
        positions = lengths[:, None] + after
        attend = decode_attend(self.model.config, self.layers, Tail(k, v, lengths), appended=True)

        def tails(layer: int) -> TailTensors:
            return k[layer], v[layer], lengths

        return forward(self.model, ids.clamp(min=0), positions, attend, tails=tails)

    def kept(self, shape: Any) -> list[Any]:
        """Nothing: all that it reads is its own."""
        return []


def alone(model: Model, cache: RaggedCache, *, batch: int, rows: int) -> Alone:
    """Returns a reader for `batch` questions at a time, with `rows` rows for each question and its answer."""
    start = cache.context_length
    tail = roomy_tail(cache, batch, rows, dtype=model.dtype)
    return Alone(model, tuple(all_ragged(cache.context)), tail, start, len(cache.token_ids) - start, rows)
