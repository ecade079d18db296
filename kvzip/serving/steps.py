"""A step: one forward pass over rows of many requests. On a GPU steps are CUDA graphs, replayed by their sizes."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float64, Int32
from torch import Tensor

from .. import ops
from ..decoding import NO_TOKEN, capture, sample
from ..models import Attend, Model, forward, logits
from .pages import PagePool, layer_pages, write_rows_
from .scheduler import bucket
from .tables import Tables

ROW_FIELDS = 7  # of a row: token or NO_TOKEN, sequence, length, position, row number, table, place
SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768)  # rows that graphs are made for
_GRAPHS = 24  # kept at a time
_AHEAD = 4  # host buffers: more than steps that are under way


@dataclass
class Step:
    """One pass as the host plans it. Rows of a sequence (a request in this step) are consecutive, oldest first.

    rows: (token or NO_TOKEN for the sequence's last one, sequence, tail rows seen, position, row number in the pages,
    table, place in it or -1) of each row. slots and last: of each sequence, its slot and its last row.
    temperature 0 takes the likeliest token; `draw`, uniform in [0, 1), chooses otherwise.
    """

    rows: list[tuple[int, int, int, int, int, int, int]] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    sampling: list[tuple[float, float, float]] = field(default_factory=list)  # temperature, top_p, draw


@dataclass(frozen=True)
class _Shape:
    """What a graph is made for. `tables`: number and version of each table that rows read."""

    rows: int
    sequences: int
    sampled: bool
    tables: tuple[tuple[int, int], ...]


class Runner:
    """Runs steps on the model's device. Its one user is the engine's thread.

    The last token of each slot stays on the device, so that the next step can be launched before the host has seen it.
    """

    def __init__(self, model: Model, pool: PagePool, tables: Tables) -> None:
        self.model, self.pool, self.tables = model, pool, tables
        self.steps = 0
        self._last = torch.zeros(len(pool.table), dtype=torch.long, device=model.device)
        self._graphs: OrderedDict[_Shape, _Graph] = OrderedDict()
        self._replays = model.device.type == "cuda"
        self._memory = torch.cuda.graph_pool_handle() if self._replays else None
        self._host: list[_HostBuffers] = []

    @torch.no_grad()
    def run(self, step: Step) -> Callable[[], list[int]]:
        """Launches a step; the function returned waits for it and returns each sequence's token, or NO_TOKEN.

        Call that function before launching three more.
        """
        self.steps += 1
        used = sorted({row[5] for row in step.rows if row[5] >= 0} or {0})
        tables = tuple((number, self.tables.versions[number]) for number in used)
        sampled = any(temperature > 0 for temperature, *_ in step.sampling)
        if not self._replays:
            shape = _Shape(len(step.rows), len(step.slots), sampled, tables)
            ints, floats = packed(step, shape, spare=len(self._last) - 1)
            tokens = self._advance(torch.from_numpy(ints), torch.from_numpy(floats), shape)
            found = tokens.tolist()
            return lambda: found
        sequences = bucket(len(step.slots), SIZES)
        rows = sequences if len(step.rows) == len(step.slots) else bucket(max(len(step.rows), sequences), SIZES)
        return self._replay(step, _Shape(rows, sequences, sampled, tables))

    def forget_graphs(self) -> None:
        """Drops all graphs; they are captured again when they are needed."""
        self._graphs.clear()

    def _replay(self, step: Step, shape: _Shape) -> Callable[[], list[int]]:
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._graphs[shape] = self._captured(shape)
            while len(self._graphs) > _GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(shape)
        host = self._host_buffers()
        ints, floats = packed(step, shape, spare=len(self._last) - 1)
        host.ints[: len(ints)].copy_(torch.from_numpy(ints))
        host.floats[: floats.size].copy_(torch.from_numpy(floats.reshape(-1)))
        graph.ints.copy_(host.ints[: len(ints)], non_blocking=True)
        graph.floats.copy_(host.floats[: floats.size].view(3, -1), non_blocking=True)
        graph.replay()
        host.tokens[: shape.sequences].copy_(graph.tokens, non_blocking=True)
        host.copied.record(torch.cuda.current_stream(self.model.device))
        count = len(step.slots)

        def wait() -> list[int]:
            host.copied.synchronize()
            return host.tokens[:count].tolist()

        return wait

    def _host_buffers(self) -> "_HostBuffers":
        """Pinned buffers that no step under way uses: those used longest ago of a few."""
        if len(self._host) < _AHEAD:
            most = SIZES[-1]

            def pinned(*shape: int, dtype: torch.dtype) -> Tensor:
                return torch.empty(shape, dtype=dtype, pin_memory=True)

            ints, floats = pinned((ROW_FIELDS + 2) * most, dtype=torch.int32), pinned(3 * most, dtype=torch.float64)
            self._host.append(_HostBuffers(ints, floats, pinned(most, dtype=torch.long), torch.cuda.Event()))
        else:
            self._host.append(self._host.pop(0))
        return self._host[-1]

    def _captured(self, shape: _Shape) -> "_Graph":
        device = self.model.device
        ints = torch.zeros(ROW_FIELDS * shape.rows + 2 * shape.sequences, dtype=torch.int32, device=device)
        floats = torch.zeros((3, shape.sequences), dtype=torch.float64, device=device)
        tokens = torch.zeros(shape.sequences, dtype=torch.long, device=device)

        def run() -> None:
            tokens.copy_(self._advance(ints, floats, shape))

        tables = [self.tables.tables[number] for number, _ in shape.tables]
        return _Graph(ints, floats, tokens, capture(run, device, memory=self._memory), tables)

    def _advance(self, ints: Int32[Tensor, " I"], floats: Float64[Tensor, "3 M"], shape: _Shape) -> Tensor:
        """Appends the rows to their tails, and returns the next token of each sequence, which its slot keeps too."""
        split = ROW_FIELDS * shape.rows
        ids, sequence, length, position, number, table, place = ints[:split].view(ROW_FIELDS, -1)
        slots, last = ints[split:].view(2, -1).long()
        previous = self._last[slots][sequence.clamp(min=0).long()]
        ids = torch.where(ids == NO_TOKEN, previous, ids).clamp(min=0).long()
        rows = {
            own: _rows_of(sequence, length, table, place, own, only=len(shape.tables) == 1) for own, _ in shape.tables
        }
        attend = _rows_attend(self.model, self.pool, self.tables, rows, self.pool.table[slots], number.long())
        hidden = forward(self.model, ids[:, None], position[:, None].long(), attend)
        tokens = _choose(logits(self.model, hidden[:, 0][last]), floats, sampled=shape.sampled)
        self._last.index_copy_(0, slots, tokens)
        return tokens


@dataclass(frozen=True)
class _Graph:
    """A captured step with its inputs and outputs, and what it reads, kept alive."""

    ints: Tensor
    floats: Tensor
    tokens: Tensor
    replay: Callable[[], None]
    tables: list[ops.ContextTable]


@dataclass(frozen=True)
class _HostBuffers:
    ints: Tensor
    floats: Tensor
    tokens: Tensor
    copied: torch.cuda.Event


def packed(step: Step, shape: _Shape, *, spare: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a step's numbers, padded to a shape: int32, the rows' fields one after the other, then slots and last
    rows; float64 [3 M], temperature, top_p and draw. Padding is of no sequence and writes to page 0.

    Args:
        spare: the slot that belongs to no request.
    """
    rows, sequences = len(step.rows), len(step.slots)
    fields = np.zeros((ROW_FIELDS, shape.rows), dtype=np.int32)
    fields[[1, 5, 6], rows:] = -1
    fields[:, :rows] = np.array(step.rows, dtype=np.int32).T
    ends = np.zeros((2, shape.sequences), dtype=np.int32)
    ends[0] = spare
    ends[:, :sequences] = step.slots, step.last
    floats = np.zeros((3, shape.sequences))
    floats[1] = 1.0
    floats[:, :sequences] = np.array(step.sampling, dtype=np.float64).T
    return np.concatenate([fields.reshape(-1), ends.reshape(-1)]), floats


def _rows_of(sequence: Tensor, length: Tensor, table: Tensor, place: Tensor, own: int, *, only: bool) -> ops.QueryRows:
    """The rows that read table `own`; the others are of no context and no sequence, and their attention is 0."""
    if only:
        return ops.QueryRows(place.clone(), sequence.clone(), length.clone())  # aligned for kernels
    mine = table == own
    return ops.QueryRows(torch.where(mine, place, -1), torch.where(mine, sequence, -1), torch.where(mine, length, 0))


def _rows_attend(
    model: Model, pool: PagePool, tables: Tables, rows: dict[int, ops.QueryRows], names: Tensor, numbers: Tensor
) -> Attend:
    """The strategy of a step: each row is written to its page, and attends to its context and the rows before it."""
    config = model.config
    plans = {
        own: ops.decode_plan(
            tables.tables[own],
            mine,
            query_heads=config.num_heads,
            dtype=model.dtype,
            pages=layer_pages(pool, 0, names),
        )
        for own, mine in rows.items()
    }

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        write_rows_(pool, layer, numbers, k[:, :, 0], v[:, :, 0])
        pages, out = layer_pages(pool, layer, names), None
        for own, mine in rows.items():
            part, _ = ops.decode_rows(
                q[:, :, 0],
                tables.tables[own],
                layer,
                mine,
                scale=config.attn_scale,
                softcap=config.attn_softcap,
                window=config.layers[layer].window,
                pages=pages,
                plan=plans[own],
            )
            out = part if out is None else out + part  # where one is a row's, the others are 0
        assert out is not None
        return out[:, :, None]

    return attend


def _choose(scores: Tensor, floats: Tensor, *, sampled: bool) -> Tensor:
    """The next token of each row of logits; NO_TOKEN where they are NaN or all -inf."""
    likeliest = scores.argmax(-1, keepdim=True)  # argmax returns a NaN if there is one
    top, chosen = scores.gather(-1, likeliest)[:, 0], likeliest[:, 0]
    if sampled:
        temperature, top_p, draw = floats[:, :, None]
        drawn = sample(scores, draw.float(), temperature=temperature.clamp(min=5e-324), top_p=top_p)
        chosen = torch.where(temperature[:, 0] > 0, drawn, chosen)
    return torch.where(top > -torch.inf, chosen, NO_TOKEN)
