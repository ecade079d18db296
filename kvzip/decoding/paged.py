"""Rows over many contexts: their tails are in pages, and each context is read once for all of its rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from .. import ops
from ..models import Attend, Model, forward
from .choosing import NO_TOKEN
from .pages import ROWS, PagePool, layer_pages, write_rows_
from .sequences import Part
from .steps import Packed, bucket
from .tables import Tables

_FIELDS = 8  # of a row: length, position, row number; by how much these grow; token or NO_TOKEN, part, place, table
SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768)  # rows of steps without questions
_ROWS, _PARTS = (32, 64, 128, 256, 384, 512, 768), (8, 32, 96, 384)
"""Rows and parts of steps that read questions: few of them, for each pair is a graph."""


@dataclass(frozen=True)
class Rows:
    """The shape of a step: rows and parts with padding, and number and version of each table that rows read."""

    rows: int
    parts: int
    tables: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Paged:
    """A reader of sequences whose tails are in pages, over the contexts of tables. See `steps.Reader`.

    Its slots are those of the pool; the last one belongs to no sequence.
    """

    model: Model
    pool: PagePool
    tables: Tables

    def pack(self, parts: list[Part], *, padded: bool) -> Packed:
        """A step's numbers: the fields of its rows one after the other, then slots and last rows of its parts.

        Padding is of no part, and writes to page 0.
        """
        rows, width = sizes_of(sum(len(part.tokens) for part in parts), len(parts), padded=padded)
        used = sorted({part.sequence.place[0] for part in parts if part.sequence.place[1] >= 0} or {0})
        shape = Rows(rows, width, tuple((number, self.tables.versions[number]) for number in used))
        return Packed(self.numbers(parts, shape), shape, width, list(range(len(parts))), _grows(rows))

    def numbers(self, parts: list[Part], shape: Rows) -> np.ndarray:
        """The numbers of a step, padded to a shape."""
        fields = np.zeros((_FIELDS, shape.rows), dtype=np.int32)
        fields[5:7] = -1
        ends = np.zeros((2, shape.parts), dtype=np.int32)
        ends[0] = len(self.pool.table) - 1
        rows: list[tuple[int, ...]] = []  # faster than arrays where most parts are one token
        for n, part in enumerate(parts):
            sequence, (table, place) = part.sequence, part.sequence.place
            for row, token in enumerate(part.tokens, start=part.first):
                number = sequence.pages[row // ROWS] * ROWS + row % ROWS
                rows.append((row + 1, sequence.start + row, number, 1, token, n, place, table))
            ends[:, n] = sequence.slot, len(rows) - 1
        fields[:, : len(rows)] = np.array(rows, dtype=np.int32).T
        return np.concatenate([fields.reshape(-1), ends.reshape(-1)])

    def hidden(
        self, numbers: Int32[Tensor, " I"], shape: Rows, last: Int64[Tensor, " S"]
    ) -> tuple[Float[Tensor, "M H"], Int64[Tensor, " M"]]:
        """Appends the rows to their pages; returns the hidden state of each part's last row, and its slot."""
        split = _FIELDS * shape.rows
        length, position, number, _, ids, part, place, table = numbers[:split].view(_FIELDS, -1)
        slots, ends = numbers[split:].view(2, -1).long()
        previous = last[slots][part.clamp(min=0).long()]
        ids = torch.where(ids == NO_TOKEN, previous, ids).clamp(min=0).long()
        rows = {own: _rows_of(part, length, table, place, own, only=len(shape.tables) == 1) for own, _ in shape.tables}
        attend = _attend(self, rows, self.pool.table[slots], number)
        hidden = forward(self.model, ids[:, None], position[:, None], attend)
        return hidden[:, 0][ends], slots

    def kept(self, shape: Rows) -> list[Any]:
        """The tables of a shape."""
        return [self.tables.tables[number] for number, _ in shape.tables]


def sizes_of(rows: int, parts: int, *, padded: bool) -> tuple[int, int]:
    """Returns the rows and parts of a step, with the padding of graphs if it is to be padded."""
    if not padded:
        return rows, parts
    if rows == parts:
        return bucket(rows, SIZES), bucket(rows, SIZES)
    parts = bucket(parts, _PARTS)
    return bucket(max(rows, parts), _ROWS), parts


def _grows(rows: int) -> tuple[slice, slice]:
    """Length, position and row number grow by one; the last of them only within a page."""
    return slice(0, 3 * rows), slice(3 * rows, 4 * rows)


def _rows_of(part: Tensor, length: Tensor, table: Tensor, place: Tensor, own: int, *, only: bool) -> ops.QueryRows:
    """The rows that read table `own`; the others are of no context and no part, and their attention is 0."""
    if only:
        return ops.QueryRows(place.clone(), part.clone(), length.clone())  # aligned for kernels
    mine = table == own
    return ops.QueryRows(torch.where(mine, place, -1), torch.where(mine, part, -1), torch.where(mine, length, 0))


def _attend(reader: Paged, rows: dict[int, ops.QueryRows], names: Tensor, number: Tensor) -> Attend:
    """The strategy of a step: each row is written to its page, and attends to its context and the rows before it.

    Args:
        names: the pages of each part.
        number: of each row, where it lies.
    """
    model, pool, tables, config = reader.model, reader.pool, reader.tables.tables, reader.model.config
    number = number.clone()
    plans = {
        own: ops.decode_plan(
            tables[own], mine, query_heads=config.num_heads, dtype=model.dtype, pages=layer_pages(pool, 0, names)
        )
        for own, mine in rows.items()
    }

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        write_rows_(pool, layer, number, k[:, :, 0], v[:, :, 0])
        pages, out = layer_pages(pool, layer, names), None
        for own, mine in rows.items():
            part, _ = ops.decode_rows(
                q[:, :, 0],
                tables[own],
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
