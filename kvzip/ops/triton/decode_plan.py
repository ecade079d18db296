"""Work lists of `decode_rows`, made on the device once a step for all layers, by four launches of fixed grids."""

from dataclasses import dataclass
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Int32
from torch import Tensor

from kvzip.ops.schedule import TILE, processors_of
from kvzip.ops.triton.common import interpreted, on_device, overlaps_launches
from kvzip.ops.triton.decode_combine import PLACE
from kvzip.ops.triton.decode_kernel import ITEM
from kvzip.ops.triton.decode_launch import Launch, choose_launch, tail_block
from kvzip.ops.types import ContextTable, Pages, QueryRows

_TILE = tl.constexpr(TILE)  # rows that splits are multiples of
_STATS = tl.constexpr(3)  # of an owner: its first row, how many it has, and rows of its tail that they see
_LENGTHS = tl.constexpr(96)  # of splits that are tried: 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ... tiles
_BLOCK = tl.constexpr(128)
_MANY_ROWS = 1024  # query rows from which contexts are expected to have more than 64


@dataclass(frozen=True)
class Plan:
    """What programs do for N rows over C contexts of L layers, and over S tails.

    An item is (context or sequence, head, first row, row after the last, first query row, query row after the last),
    where query rows are rows x group. Items of a context's head are all blocks of query rows of its first split, then
    of its second and so on, so that programs that read the same rows run at the same time. Items that are not needed
    have no query rows.
    """

    launches: tuple[Launch, ...]  # of each layer
    tail_block: int  # query rows of a tail's item
    order: Int32[Tensor, " N"]  # rows by context
    items: Int32[Tensor, "L I 6"]
    tail_items: Int32[Tensor, "J 6"]
    first: Int32[Tensor, "L CH1"]  # items first[c * H + h]:first[c * H + h + 1] are of head h of context c
    places: Int32[Tensor, "N 7"]
    """Of each row: context or -1, its place among the context's rows, blocks of these; the first item of its tail, its
    place among the sequence's rows, splits of the tail, blocks of these rows."""


def plan_triton(
    table: ContextTable, rows: QueryRows, *, query_heads: int, dtype: torch.dtype, pages: Pages | None
) -> Plan:
    """`decode_plan`: the host knows shapes alone, and never waits for the device."""
    layers, contexts, heads = len(table.formats), len(table.layers), table.offsets.shape[2] - 1
    count, group, sms = len(rows.context), query_heads // heads, processors_of(rows.context.device)
    launches = _launches(table, count * group, dtype, hopper=overlaps_launches(rows.context) or interpreted())
    block, programs = launches[0].block_m, sms * launches[0].per_sm
    sequences, capacity = (0, 0) if pages is None else (len(pages.table), pages.table.shape[1] * pages.k.shape[2])
    own_block = tail_block(launches[0], -(-count * group // max(1, sequences)), dtype)
    # Fewer items would leave programs without work at the end, more cost partial results; each block needs one a head.
    most, own_most = (
        max(programs, (count * group // size + min(owners, count)) * heads)
        for size, owners in ((block, contexts), (own_block, sequences))
    )
    plan = Plan(
        launches,
        own_block,
        rows.context.new_empty(count),
        rows.context.new_empty((layers, most, ITEM.value)),
        rows.context.new_empty((own_most if sequences else 1, ITEM.value)),
        rows.context.new_empty((layers, contexts * heads + 1)),
        rows.context.new_empty((count, PLACE.value)),
    )
    _fill(rows.context, rows.sequence, rows.length, table.offsets, plan, block, group, sequences, capacity)
    return plan


@on_device
def _fill(
    context: Int32[Tensor, " N"],
    sequence: Int32[Tensor, " N"],
    length: Int32[Tensor, " N"],
    offsets: Int32[Tensor, "L C H1"],
    plan: Plan,
    block: int,
    group: int,
    sequences: int,
    capacity: int,
) -> None:
    layers, contexts, heads1 = offsets.shape
    count, heads, owners = len(context), heads1 - 1, contexts + sequences
    stats = context.new_empty((owners, _STATS.value))
    own_first = context.new_empty(sequences * heads + 1)
    sizes = {"G": group, "H": heads, "M": block, "TAIL_M": plan.tail_block, "num_warps": 4, "enable_fp_fusion": True}
    _owners_kernel[(triton.cdiv(owners, 32),)](
        context, sequence, length, stats, count, contexts, owners, capacity, num_warps=4, enable_fp_fusion=True
    )
    _splits_kernel[(layers + 1,)](
        offsets, stats, plan.first, own_first, layers, contexts, sequences,
        plan.items.shape[1], len(plan.tail_items), **sizes,
    )  # fmt: skip
    blocks, own_blocks = (triton.cdiv(n, _BLOCK.value) for n in (plan.items.shape[1], len(plan.tail_items)))
    _items_kernel[(layers * blocks + own_blocks,)](
        offsets, stats, plan.first, own_first, plan.items, plan.tail_items, layers, contexts, sequences,
        plan.items.shape[1], len(plan.tail_items), blocks,
        STEPS=(max(contexts, sequences) * heads).bit_length(), **sizes,
    )  # fmt: skip
    if count:
        _rows_kernel[(triton.cdiv(count, 32),)](
            context, sequence, own_first, plan.order, plan.places, count, contexts, sequences, **sizes
        )


@triton.jit(do_not_specialize=["count", "contexts", "owners", "capacity"])
@no_type_check
def _owners_kernel(context_ptr, sequence_ptr, length_ptr, stats_ptr, count, contexts, owners, capacity):
    """_STATS of 32 contexts or, after them, sequences: rows of a context count in the order that sorts them by it."""
    x = tl.program_id(0) * 32 + tl.arange(0, 32)
    start, members, seen = tl.zeros([32], tl.int32), tl.zeros([32], tl.int32), tl.zeros([32], tl.int32)
    for at in range(0, count, _BLOCK):
        j = at + tl.arange(0, _BLOCK)
        context = tl.load(context_ptr + j, mask=j < count, other=-1)[None, :]
        sequence = tl.load(sequence_ptr + j, mask=j < count, other=-1)[None, :]
        length = tl.load(length_ptr + j, mask=j < count, other=0)[None, :]
        of_context = (x < contexts)[:, None]
        mine = tl.where(of_context, context == x[:, None], sequence == x[:, None] - contexts)
        # rows of a sequence are consecutive: as many come before them as belong to others while it has none
        before = tl.where(of_context, (context >= 0) & (context < x[:, None]), False)
        first = tl.min(tl.where(mine, j[None, :], count), 1)
        start = tl.where((x >= contexts) & (members == 0), first, start + tl.sum(before.to(tl.int32), 1))
        members += tl.sum(mine.to(tl.int32), 1)
        seen = tl.maximum(seen, tl.max(tl.where(mine, length, 0), 1))
    stats = stats_ptr + x * _STATS
    tl.store(stats, start, mask=x < owners)
    tl.store(stats + 1, members, mask=x < owners)
    tl.store(stats + 2, tl.minimum(seen, capacity), mask=x < owners)


@triton.jit
@no_type_check
def _head(offsets_ptr, stats_ptr, x, bound, G: tl.constexpr, H: tl.constexpr, M: tl.constexpr, TAIL: tl.constexpr):
    """Of head x % H of owner x // H: its first row, rows, tiles; first query row, query rows and blocks of those."""
    owner = x // H
    stats = stats_ptr + owner * _STATS
    row = tl.load(stats, mask=x < bound, other=0) * G
    rows = tl.load(stats + 1, mask=x < bound, other=0) * G
    if TAIL:
        begin = x * 0
        length = tl.load(stats + 2, mask=x < bound, other=0)
    else:
        at = offsets_ptr + owner * (H + 1) + x % H
        begin = tl.load(at, mask=x < bound, other=0)
        length = tl.load(at + 1, mask=x < bound, other=0) - begin
    tiles = tl.where(rows > 0, (length + _TILE - 1) // _TILE, 0)
    return begin, length, tiles, row, rows, (rows + M - 1) // M


@triton.jit
@no_type_check
def _pieces(
    offsets_ptr, stats_ptr, x, tried, bound, G: tl.constexpr, H: tl.constexpr, M: tl.constexpr, TAIL: tl.constexpr
):
    """Items of head x if its splits have the length that is `tried`, one of _LENGTHS."""
    longest = ((4 + tried % 4) << (tried // 4)) >> 1
    found = _head(offsets_ptr, stats_ptr, x, bound, G, H, M, TAIL)
    return (found[2] + longest - 1) // longest * found[5]


@triton.jit
@no_type_check
def _cut(
    offsets_ptr, stats_ptr, first_ptr, bound, most,
    G: tl.constexpr, H: tl.constexpr, M: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Cuts heads into equal splits of whole tiles, as short as `most` items allow; at least one for a head's block."""
    low, high = 0, _LENGTHS - 1
    for _ in range(7):  # pieces fall as splits grow: a binary search
        tried = (low + high) // 2
        pieces = 0
        for at in range(0, bound, _BLOCK):
            x = at + tl.arange(0, _BLOCK)
            pieces += tl.sum(_pieces(offsets_ptr, stats_ptr, x, tried, bound, G, H, M, TAIL))
        enough = pieces <= most
        high = tl.where(enough, tried, high)
        low = tl.where(enough, low, tl.minimum(tried + 1, high))
    total = 0
    tl.store(first_ptr, 0)
    for at in range(0, bound, _BLOCK):
        x = at + tl.arange(0, _BLOCK)
        items = _pieces(offsets_ptr, stats_ptr, x, low, bound, G, H, M, TAIL)
        tl.store(first_ptr + 1 + x, total + tl.cumsum(items, 0), mask=x < bound)
        total += tl.sum(items)


@triton.jit(do_not_specialize=["layers", "contexts", "sequences", "most", "own_most"])
@no_type_check
def _splits_kernel(
    offsets_ptr, stats_ptr, first_ptr, own_first_ptr, layers, contexts, sequences, most, own_most,
    G: tl.constexpr, H: tl.constexpr, M: tl.constexpr, TAIL_M: tl.constexpr,
):  # fmt: skip
    """How many items there are before each head: of one layer's contexts, or of tails."""
    layer = tl.program_id(0)
    if layer < layers:
        offsets = offsets_ptr + layer * contexts * (H + 1)
        _cut(offsets, stats_ptr, first_ptr + layer * (contexts * H + 1), contexts * H, most, G, H, M, False)
    else:
        own = stats_ptr + contexts * _STATS
        _cut(offsets_ptr, own, own_first_ptr, sequences * H, own_most, G, H, TAIL_M, True)


@triton.jit
@no_type_check
def _list(
    offsets_ptr, stats_ptr, first_ptr, items_ptr, index, bound, most,
    G: tl.constexpr, H: tl.constexpr, M: tl.constexpr, STEPS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Writes items `index`, whose head is the last one with so many items or fewer before it that it has some."""
    low, high = index * 0, index * 0 + bound
    for _ in range(STEPS):
        middle = (low + high) // 2
        after = tl.load(first_ptr + 1 + middle, mask=low < high, other=0)
        low = tl.where((low < high) & (after <= index), middle + 1, low)
        high = tl.where(after <= index, high, tl.minimum(high, middle))
    needed = low < bound
    x = tl.minimum(low, bound - 1)
    begin, length, tiles, row, rows, blocks = _head(offsets_ptr, stats_ptr, x, bound, G, H, M, TAIL)
    first = tl.load(first_ptr + x, mask=x >= 0, other=0)
    each = tl.maximum(blocks, 1)
    splits = tl.maximum((tl.load(first_ptr + 1 + x, mask=x >= 0, other=0) - first) // each, 1)
    split, within = (index - first) // each, (index - first) % each
    tiles = tiles.to(tl.int64)
    from_row = (tiles * split // splits).to(tl.int32) * _TILE
    to_row = tl.minimum((tiles * (split + 1) // splits).to(tl.int32) * _TILE, length)
    at = items_ptr + index * ITEM
    live = index < most
    tl.store(at, x // H, mask=live)
    tl.store(at + 1, x % H, mask=live)
    tl.store(at + 2, begin + from_row, mask=live)
    tl.store(at + 3, begin + to_row, mask=live)
    tl.store(at + 4, tl.where(needed, row + within * M, 0), mask=live)
    tl.store(at + 5, tl.where(needed, row + rows, 0), mask=live)


@triton.jit(do_not_specialize=["layers", "contexts", "sequences", "most", "own_most", "blocks"])
@no_type_check
def _items_kernel(
    offsets_ptr, stats_ptr, first_ptr, own_first_ptr, items_ptr, own_items_ptr,
    layers, contexts, sequences, most, own_most, blocks,
    G: tl.constexpr, H: tl.constexpr, M: tl.constexpr, TAIL_M: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Items of one block of a layer, or of tails."""
    program = tl.program_id(0)
    layer = program // blocks
    if layer < layers:
        index = program % blocks * _BLOCK + tl.arange(0, _BLOCK)
        offsets = offsets_ptr + layer * contexts * (H + 1)
        first, items = first_ptr + layer * (contexts * H + 1), items_ptr + layer * most * ITEM
        _list(offsets, stats_ptr, first, items, index, contexts * H, most, G, H, M, STEPS, False)
    else:
        index = (program - layers * blocks) * _BLOCK + tl.arange(0, _BLOCK)
        own = stats_ptr + contexts * _STATS
        _list(offsets_ptr, own, own_first_ptr, own_items_ptr, index, sequences * H, own_most, G, H, TAIL_M, STEPS, True)


@triton.jit(do_not_specialize=["count", "contexts", "sequences"])
@no_type_check
def _rows_kernel(
    context_ptr, sequence_ptr, own_first_ptr, order_ptr, places_ptr, count, contexts, sequences,
    G: tl.constexpr, H: tl.constexpr, M: tl.constexpr, TAIL_M: tl.constexpr,
):  # fmt: skip
    """Order and places of 32 rows: each counts those that come before it."""
    n = tl.program_id(0) * 32 + tl.arange(0, 32)
    live = n < count
    context = tl.load(context_ptr + n, mask=live, other=-1)
    context = tl.where((context >= 0) & (context < contexts), context, contexts)
    sequence = tl.load(sequence_ptr + n, mask=live, other=-1)
    sequence = tl.where((sequence >= 0) & (sequence < sequences), sequence, sequences)
    rank, within, members = tl.zeros([32], tl.int32), tl.zeros([32], tl.int32), tl.zeros([32], tl.int32)
    own, own_members = rank, rank
    for at in range(0, count, _BLOCK):
        j = at + tl.arange(0, _BLOCK)
        other = tl.load(context_ptr + j, mask=j < count, other=-1)
        other = tl.where((other >= 0) & (other < contexts), other, tl.where(j < count, contexts, contexts + 1))[None, :]
        earlier = j[None, :] < n[:, None]
        same = other == context[:, None]
        rank += tl.sum(((other < context[:, None]) | (same & earlier)).to(tl.int32), 1)
        within += tl.sum((same & earlier).to(tl.int32), 1)
        members += tl.sum(same.to(tl.int32), 1)
        same = tl.load(sequence_ptr + j, mask=j < count, other=-1)[None, :] == sequence[:, None]
        own += tl.sum((same & earlier).to(tl.int32), 1)
        own_members += tl.sum(same.to(tl.int32), 1)
    tl.store(order_ptr + rank, n, mask=live)
    blocks = tl.maximum((members * G + M - 1) // M, 1)
    own_blocks = tl.maximum((own_members * G + TAIL_M - 1) // TAIL_M, 1)
    tailed = live & (sequence < sequences)
    first = tl.load(own_first_ptr + sequence * H, mask=tailed, other=0)
    after = tl.load(own_first_ptr + sequence * H + 1, mask=tailed, other=0)
    at = places_ptr + n * PLACE
    tl.store(at, tl.where(context < contexts, context, -1), mask=live)
    tl.store(at + 1, tl.where(context < contexts, within, 0), mask=live)
    tl.store(at + 2, blocks, mask=live)
    tl.store(at + 3, first, mask=live)
    tl.store(at + 4, tl.where(tailed, own, 0), mask=live)
    tl.store(at + 5, (after - first) // own_blocks, mask=live)
    tl.store(at + 6, own_blocks, mask=live)


def _launches(table: ContextTable, rows: int, dtype: torch.dtype, *, hopper: bool) -> tuple[Launch, ...]:
    """One for each layer, all of the same number of query rows: as if contexts there are had equally many of `rows`."""
    width = table.formats[0].width
    shared = -(-rows // max(1, sum(layers is not None for layers in table.layers)))
    shared = shared if shared > _MANY_ROWS else min(shared, 64)
    found = [choose_launch(x.k, x.v, width, shared, dtype, hopper=hopper) for x in table.formats]
    blocks = {config.block_m for config in found}
    block = min(blocks) if len(blocks) == 1 else max(16, min(blocks))
    return tuple(config._replace(block_m=block) for config in found)
