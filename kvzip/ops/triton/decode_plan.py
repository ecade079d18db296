"""Work lists of `decode_rows`, made on the device once a step for all layers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int32, Int64
from torch import Tensor

from kvzip.ops.triton.common import interpreted, overlaps_launches
from kvzip.ops.triton.decode_launch import Launch, launch_config, tail_block, tile_bits
from kvzip.ops.types import ContextTable, Pages, QueryRows

_TILE = 64  # rows that splits are multiples of
_LENGTHS = 97  # of splits that are tried: 2**1, 2**1.25, 2**1.5, ..., 2**25 tiles
_ITEMS_PER_PROGRAM = 1  # of contexts, about: fewer leave programs without work at the end, more cost partial results
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
    """`decode_plan` by torch's operations, none of which waits for the device."""
    device, contexts, heads = rows.context.device, table.offsets.shape[1], table.offsets.shape[2] - 1
    count, group = len(rows.context), query_heads // heads
    launches = _launches(table, count * group, dtype, hopper=overlaps_launches(rows.context) or interpreted())
    sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    programs, block = sms * launches[0].per_sm, launches[0].block_m
    steps = torch.arange(count, device=device)

    of_context = rows.context == torch.arange(contexts, device=device)[:, None]  # [C N]
    members = of_context.sum(1)
    start = members.cumsum(0) - members
    context = torch.where(of_context.any(0), rows.context, -1)
    order = torch.where(context < 0, contexts, context).argsort(stable=True)
    within = torch.empty_like(order).scatter_(0, order, steps) - start[context.clamp(min=0)]
    begins, lengths = table.offsets[:, :, :-1], table.offsets.diff(dim=2)
    spans, blocks = _blocks(start, members, group, block)
    target = max(_ITEMS_PER_PROGRAM * programs, (count * group // block + min(contexts, count)) * heads)
    items, first, _ = _items(begins, lengths, spans, blocks, block, target)
    places = [context, within, blocks[context.clamp(min=0)].clamp(min=1)]

    sequences = 0 if pages is None else len(pages.table)
    own_block = tail_block(launches[0], -(-count * group // max(1, sequences)), dtype)
    if pages is None or not sequences:
        tail_items, none = items.new_zeros((1, 1, 6)), torch.zeros_like(context)
        places += [none, none, none, none + 1]
    else:
        of_sequence = rows.sequence == torch.arange(sequences, device=device)[:, None]  # [S N]
        members, start = of_sequence.sum(1), of_sequence.int().argmax(1)
        sequence = torch.where(of_sequence.any(0), rows.sequence, 0)
        seen = torch.where(of_sequence, rows.length, 0).amax(1).clamp(max=pages.table.shape[1] * pages.k.shape[2])
        spans, blocks = _blocks(start, members, group, own_block)
        lengths = seen[None, :, None].expand(1, sequences, heads)
        target = max(programs, (count * group // own_block + min(sequences, count)) * heads)
        tail_items, tail_first, splits = _items(torch.zeros_like(lengths), lengths, spans, blocks, own_block, target)
        listed = of_sequence.any(0)
        places += [tail_first[0, sequence * heads], steps - start[sequence]]
        places += [torch.where(listed, splits[0, sequence, 0], 0), blocks[sequence].clamp(min=1)]
    return Plan(
        launches, own_block, order.int(), items, tail_items[0], first,
        torch.stack([x.int() for x in places], dim=1),
    )  # fmt: skip


def _blocks(
    start: Int64[Tensor, " X"], members: Int64[Tensor, " X"], group: int, block: int
) -> tuple[tuple[Tensor, Tensor], Int64[Tensor, " X"]]:
    """First query rows of X contexts or sequences and those after their last, and how many blocks they make."""
    return (start * group, (start + members) * group), (members * group + block - 1) // block


def _items(
    begins: Int32[Tensor, "L X H"],
    lengths: Int32[Tensor, "L X H"],
    spans: tuple[Int64[Tensor, " X"], Int64[Tensor, " X"]],
    blocks: Int64[Tensor, " X"],
    block: int,
    most: int,
) -> tuple[Int32[Tensor, "L I 6"], Int32[Tensor, "L XH1"], Int64[Tensor, "L X H"]]:
    """Cuts heads into equal splits of whole tiles, as short as `most` items allow; at least one for each head's block.

    Returns items, how many there are before each head, and the splits of each head.
    """
    layers, owners, heads = lengths.shape
    tiles = ((lengths.long() + _TILE - 1) // _TILE) * (blocks > 0)[:, None]
    tried = torch.exp2(torch.arange(4, 4 + _LENGTHS, device=tiles.device) / 4).long()
    pieces = ((tiles[..., None] + tried - 1) // tried * blocks[:, None, None]).sum((1, 2))  # [L K], falling
    longest = tried[(pieces > most).sum(1).clamp(max=_LENGTHS - 1)]
    splits = (tiles + longest[:, None, None] - 1) // longest[:, None, None]
    ends = (splits * blocks[:, None]).flatten(1).cumsum(1)
    first = F.pad(ends, (1, 0))
    index = torch.arange(most, device=tiles.device).expand(layers, -1).contiguous()
    of = torch.searchsorted(ends, index, right=True).clamp(max=owners * heads - 1)
    owner, head = of // heads, of % heads
    each, within = blocks[owner].clamp(min=1), index - first.gather(1, of)
    split, row = within // each, spans[0][owner] + within % each * block
    pick = lambda x: x.flatten(1).gather(1, of)  # noqa: E731
    count, of_tiles, begin, length = pick(splits).clamp(min=1), pick(tiles), pick(begins), pick(lengths)
    from_row, to_row = (_TILE * (of_tiles * i // count) for i in (split, split + 1))
    after = torch.where(index < ends[:, -1:], spans[1][owner], 0)  # those that are too many have no query rows
    items = [owner, head, begin + from_row, begin + torch.minimum(to_row, length), row, after]
    return torch.stack(items, dim=2).int(), first.int(), splits


def _launches(table: ContextTable, rows: int, dtype: torch.dtype, *, hopper: bool) -> tuple[Launch, ...]:
    """One for each layer, all of the same number of query rows: as if contexts there are had equally many of `rows`."""
    width = table.formats[0].width
    shared = -(-rows // max(1, sum(layers is not None for layers in table.layers)))
    shared = shared if shared > _MANY_ROWS else min(shared, 64)
    found = [launch_config(width, shared, dtype, tile_bits(x.k, x.v), hopper=hopper) for x in table.formats]
    blocks = {config.block_m for config in found}
    block = min(blocks) if len(blocks) == 1 else max(16, min(blocks))
    return tuple(config._replace(block_m=block) for config in found)
