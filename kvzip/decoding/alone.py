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
from ..ops.schedule import aligned
from .choosing import NO_TOKEN
from .sequences import Part
from .steps import Packed

_ROWS_OF_A_GRAPH = 4096  # questions x tokens; larger passes are bound by matmuls, not by launches
_FIELDS = 5  # of a slot: rows of its tail before and with the new ones, position of the first, growth, tokens
_MULTIPLE = 32  # of tokens that questions are padded to, so that one graph serves many lengths


@dataclass(frozen=True)
class Alone:
    """A reader of sequences over one context. See `steps.Reader`.

    The context's addresses and how it is split over the device are part of a graph, so that no step plans anew. Every
    sequence that goes on must be in every step: what a step does to the tail of a slot that it leaves out is undefined.

    Args:
        slots: the numbers of the tails, made once, as a step would launch a kernel for them.
        past: tokens of the cache's own tail, which come first in each question's.
        rows: that each tail has room for, besides.
    """

    model: Model
    layers: tuple[RaggedKV, ...]
    tail: Tail
    slots: Int64[Tensor, " S"]
    start: int
    past: int
    rows: int

    def pack(self, parts: list[Part], *, padded: bool) -> Packed:
        """A step's numbers: _FIELDS of each slot, then its tokens or NO_TOKEN.

        Questions are padded on the right: what a pad writes is overwritten by the next token, and no query sees it.
        """
        slots = [part.sequence.slot for part in parts]
        batch, longest = len(self.tail.lengths), max(len(part.tokens) for part in parts)
        replayed = padded and batch * longest <= _ROWS_OF_A_GRAPH
        if replayed and longest > 1:
            longest = min(-(-longest // _MULTIPLE) * _MULTIPLE, self.rows)
        if not padded:
            batch = max(slots) + 1
        width = aligned(batch)
        each = np.zeros((_FIELDS, width), dtype=np.int32)
        each[[0, 4]] = [[self.past], [1]]  # a slot without a sequence writes behind the cache's own tail
        each[0, slots] = [part.first for part in parts]
        each[3:, slots] = [[longest == 1] * len(parts), [len(part.tokens) for part in parts]]
        each[1:3] = each[0] + longest, each[0] + self.start
        tokens = np.zeros((batch, longest), dtype=np.int32)
        for slot, part in zip(slots, parts, strict=True):
            tokens[slot, : len(part.tokens)] = part.tokens
        numbers = np.concatenate([each.reshape(-1), tokens.reshape(-1)])
        grows = (slice(0, 3 * width), slice(3 * width, 4 * width))
        return Packed(numbers, (batch, longest), batch, slots, grows, replayed)

    def hidden(
        self, numbers: Int32[Tensor, " I"], shape: tuple[int, int], last: Int64[Tensor, " S"]
    ) -> tuple[Float[Tensor, "M H"], Int64[Tensor, " M"]]:
        """Appends the tokens to their tails; returns the hidden state of each slot's last one, and the slots."""
        batch, tokens = shape
        size = _FIELDS * aligned(batch)
        lengths, seen, positions, _, counts = numbers[:size].view(_FIELDS, -1)[:, :batch]
        ids = numbers[size:].view(batch, tokens)
        ids = torch.where(ids == NO_TOKEN, last[:batch, None], ids)
        hidden = self._forward(ids, lengths, seen, positions)
        slots = self.slots[:batch]
        return hidden[:, 0] if tokens == 1 else hidden[slots, counts.long() - 1], slots

    def read(self, ids: Int64[Tensor, "B T"], lengths: Int32[Tensor, " B"]) -> Float[Tensor, "B T M"]:
        """Appends T tokens to the first B tails, which have `lengths` rows, and returns their hidden states."""
        return self._forward(ids, lengths, lengths + ids.shape[1], lengths + self.start)

    def _forward(self, ids: Tensor, lengths: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        """Args: `lengths` and `seen` are rows of the tails before and with these tokens, which begin at `positions`."""
        batch, tokens = ids.shape
        k, v = (tuple(x[:batch] for x in rows) for rows in (self.tail.k, self.tail.v))
        attend = decode_attend(self.model.config, self.layers, Tail(k, v, lengths), appended=seen)

        def tails(layer: int) -> TailTensors:
            return k[layer], v[layer], lengths

        places = positions[:, None]
        if tokens > 1:
            places = places + torch.arange(tokens, device=ids.device)
        return forward(self.model, ids.clamp(min=0), places, attend, tails=tails)

    def kept(self, shape: Any) -> list[Any]:
        """Nothing: all that it reads is its own."""
        return []


def alone(model: Model, cache: RaggedCache, *, batch: int, rows: int) -> Alone:
    """Returns a reader for `batch` questions at a time, with `rows` rows for each question and its answer."""
    start = cache.context_length
    tail = roomy_tail(cache, batch, rows, dtype=model.dtype)
    slots = torch.arange(batch, device=model.device)
    return Alone(model, tuple(all_ragged(cache.context)), tail, slots, start, len(cache.token_ids) - start, rows)
