"""A step: one forward pass over parts of sequences. On a GPU steps are CUDA graphs, replayed by their sizes."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from ..models import Model, logits
from .choosing import CHOICES, GREEDY, choose
from .graphs import GraphMemory, capture
from .sequences import Part, Wait

_GRAPHS = 48  # kept at a time
_BUFFERS = 8  # on the host: two for each step, and steps under way are fewer than four
_DOUBLE = 2  # int32 numbers that a float64 takes


@dataclass(frozen=True)
class Packed:
    """A step as the device reads it. `shape` is all that its launches depend on besides `numbers`, and names a graph.

    ends: where the token of each part is, of `width`. grows: two slices of the numbers. In the step after this one, if
    it has the same parts, those of the first are larger by those of the second, as often as it fits in the first.
    """

    numbers: np.ndarray
    shape: Hashable
    width: int
    ends: list[int]
    grows: tuple[slice, slice] | None = None
    replayed: bool = True


@runtime_checkable
class Reader(Protocol):
    """Where sequences lie, and how new rows of them read what is before them."""

    def pack(self, parts: list[Part], *, padded: bool) -> Packed:
        """Puts a step into numbers; padded: to one of few sizes, as graphs are made for them."""
        ...

    def hidden(
        self, numbers: Int32[Tensor, " I"], shape: Any, last: Int64[Tensor, " S"]
    ) -> tuple[Float[Tensor, "M H"], Int64[Tensor, " M"]]:
        """Appends the rows to their tails; returns the last hidden state of each part, and its slot.

        Args:
            last: the last token of each slot, which stands for NO_TOKEN.
        """
        ...

    def kept(self, shape: Any) -> list[Any]:
        """What a graph of that shape reads, to be kept alive with it."""
        ...


class Runner:
    """Runs steps on the model's device, for one thread. All of decoding goes through `run`.

    The last token of each slot stays on the device, so that the next step can be launched before the host has seen it.

    Args:
        slots: that sequences may have, the reader's spare ones included.
    """

    def __init__(self, model: Model, reader: Reader, *, slots: int) -> None:
        self.model, self.reader = model, reader
        self.steps = 0
        self.last = torch.zeros(slots, dtype=torch.long, device=model.device)
        self._said: Tensor | None = None  # [S V], which tokens an answer has; made for the first penalty
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._replays = model.device.type == "cuda"
        self._memory = GraphMemory()
        self._host: list[_HostBuffers] = []

    @torch.no_grad()
    def run(self, parts: list[Part]) -> Wait:
        """Launches a step; the function returned waits for it and returns each part's token, or NO_TOKEN.

        Call that function before launching three more.
        """
        self.steps += 1
        packed = self.reader.pack(parts, padded=self._replays)
        by = np.tile(np.array(GREEDY)[:, None], packed.width)
        by[:, packed.ends] = np.array([part.by for part in parts]).T
        numbers = np.concatenate([by.reshape(-1).view(np.int32), packed.numbers])
        shape = _Shape(packed.width, bool((by[0] > 0).any()), bool((by[3] > 1).any()), packed.shape)
        if shape.penalized:
            self._forget_said(parts)
        if self._replays and packed.replayed:
            tokens = self._replay(numbers, shape, packed.grows)
        else:
            tokens = self.advance(torch.from_numpy(numbers).to(self.model.device), shape)
        if not self._replays:
            listed = tokens.tolist()
            return lambda: [listed[end] for end in packed.ends]
        host = self._host_buffers(len(numbers), packed.width)
        host.tokens[: packed.width].copy_(tokens, non_blocking=True)
        host.copied.record(torch.cuda.current_stream(self.model.device))

        def wait() -> list[int]:
            host.copied.synchronize()
            listed = host.tokens[: packed.width].tolist()
            return [listed[end] for end in packed.ends]

        return wait

    def forget_graphs(self) -> None:
        """Drops all graphs; they are captured again when they are needed."""
        self._graphs.clear()

    def advance(
        self, numbers: Int32[Tensor, " I"], shape: "_Shape", grows: tuple[slice, slice] | None = None
    ) -> Int64[Tensor, " M"]:
        """Runs a step whose numbers are on the device; returns the next token of each part, which its slot keeps."""
        split = _DOUBLE * CHOICES * shape.width
        by, numbers = numbers[:split].view(torch.float64).view(CHOICES, -1), numbers[split:]
        hidden, slots = self.reader.hidden(numbers, shape.rows, self.last)
        said = None if not shape.penalized or self._said is None else self._said
        scores = logits(self.model, hidden)
        tokens = choose(scores, by, sampled=shape.sampled, said=None if said is None else said[slots])
        if said is not None:
            said.view(-1).index_fill_(0, slots * said.shape[1] + tokens.clamp(min=0), True)
        self.last.index_copy_(0, slots, tokens)
        if grows is not None:
            more, less = grows
            numbers[more].view(-1, less.stop - less.start).add_(numbers[less])
        return tokens

    def _forget_said(self, parts: list[Part]) -> None:
        """Empties what is known of the answers that begin."""
        if self._said is None:
            shape = (len(self.last), self.model.config.vocab_size)
            self._said = torch.zeros(shape, dtype=torch.bool, device=self.model.device)
        for slot in [part.sequence.slot for part in parts if part.gives and part.sequence.asked == 1]:
            self._said[slot].zero_()

    def _replay(self, numbers: np.ndarray, shape: "_Shape", grows: tuple[slice, slice] | None) -> Tensor:
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._graphs[shape] = self._captured(len(numbers), shape, grows)
            while len(self._graphs) > _GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(shape)
        if graph.expected is None or not np.array_equal(graph.expected, numbers):
            host = self._host_buffers(len(numbers), shape.width)
            host.numbers[: len(numbers)].copy_(torch.from_numpy(numbers))
            graph.numbers.copy_(host.numbers[: len(numbers)], non_blocking=True)
            host.copied.record(torch.cuda.current_stream(self.model.device))
        tokens = graph.replay()
        graph.expected = numbers
        if grows is not None:
            own = numbers[_DOUBLE * CHOICES * shape.width :]
            more, less = grows
            own[more].reshape(-1, less.stop - less.start)[:] += own[less]
        return tokens

    def _host_buffers(self, numbers: int, width: int) -> "_HostBuffers":
        """Pinned buffers that no step under way uses: those used longest ago of a few."""
        if not self._host or len(self._host[0].numbers) < numbers or len(self._host[0].tokens) < width:
            sizes = [1 << (max(n, 64) - 1).bit_length() for n in (numbers, width)]
            both = _pinned((_BUFFERS, sizes[0]), torch.int32), _pinned((_BUFFERS, sizes[1]), torch.long)
            self._host = [_HostBuffers(ints, longs, torch.cuda.Event()) for ints, longs in zip(*both, strict=True)]
        host = self._host.pop(0)
        self._host.append(host)
        host.copied.synchronize()  # no wait, unless more steps are launched than are looked at
        return host

    def _captured(self, size: int, shape: "_Shape", grows: tuple[slice, slice] | None) -> "_Graph":
        numbers = torch.zeros(size, dtype=torch.int32, device=self.model.device)
        replay = capture(partial(self.advance, numbers, shape, grows), self.model.device, memory=self._memory)
        return _Graph(numbers, replay, self.reader.kept(shape.rows))


@dataclass(frozen=True)
class _Shape:
    """What a graph is made for: parts with padding, how tokens are chosen, and what the reader says of its rows."""

    width: int
    sampled: bool
    penalized: bool
    rows: Any


@dataclass
class _Graph:
    """A captured step with its inputs, a function that runs it and returns its tokens, and what it reads, kept alive.

    `expected` are its inputs as the last replay left them: a step that goes on with the same parts sends nothing.
    """

    numbers: Tensor
    replay: Callable[[], Tensor]
    kept: list[Any]
    expected: np.ndarray | None = None


@dataclass(frozen=True)
class _HostBuffers:
    numbers: Tensor
    tokens: Tensor
    copied: torch.cuda.Event


def _pinned(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def bucket(count: int, sizes: tuple[int, ...]) -> int:
    """Returns the least of `sizes`, ascending, that holds `count`; beyond the last, `count` itself."""
    return next((size for size in sizes if size >= count), count)
