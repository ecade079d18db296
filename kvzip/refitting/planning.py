"""What is fitted together, decided on the host before the passes, so that it does not wait for the device in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

from ..cache import RaggedKV
from ..ops.types import owners

TOGETHER = 1 << 27  # bytes of products of a group, at most


@dataclass(frozen=True)
class Block:
    """The heads of some successive layers that have something to fit in one chunk, those with most rows first.

    layers: which of the layers that are fitted.
    heads: l * H + h of each, l counted from the block's first layer.
    slots: (c * L + l) * H + h of each, c the chunk, l counted from the first of all L layers.
    first, local: a head's first row among those of all layers, and in the block's `keys` of this chunk.
    groups: how many of the heads are padded together, and to how many rows.
    """

    layers: range
    heads: Int64[Tensor, " B"]
    slots: Int64[Tensor, " B"]
    first: Int64[Tensor, " B"]
    local: Int64[Tensor, " B"]
    counts: Int64[Tensor, " B"]
    groups: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Plan:
    """The rows of L layers by chunk.

    blocks[c]: what of chunk c is fitted, `depth` layers at a time.
    whole: where a head keeps all pairs of a chunk.
    rows[l]: the rows of a layer, those of each chunk together, and of a chunk in their order; the prefix's come first.
    cuts[l]: where in rows[l] each chunk begins, and the end.
    offsets[l, c, h]: where among the chunk's rows those of head h begin, and the end.
    """

    blocks: list[list[Block]]
    depth: int
    whole: Bool[Tensor, "c L H"]
    rows: list[Int32[Tensor, " _"]]
    cuts: list[list[int]]
    offsets: Int32[Tensor, "L c H1"]


def plan(layers: Sequence[RaggedKV], cuts: Sequence[int], depth: int) -> Plan:
    """Returns the plan of layers whose chunks begin at the tokens `cuts`, which end with the context's end.

    It waits for the device.
    """
    device = layers[0].offsets.device
    bounds = bounds_of(layers, cuts)
    counts = bounds.diff(dim=2).movedim(2, 1)  # [L c H]
    sizes = [stop - first for first, stop in pairwise(cuts)]
    total = [len(layer.positions) for layer in layers]
    edges = torch.tensor(cuts, dtype=torch.int32, device=device)
    by_chunk = [torch.bucketize(layer.positions, edges, right=True).argsort(stable=True).int() for layer in layers]
    return Plan(
        blocks=blocks_of(bounds.tolist(), [*accumulate(total, initial=0)], sizes, depth, device),
        depth=depth,
        whole=counts.movedim(1, 0) == torch.tensor(sizes, device=device)[:, None, None],
        rows=by_chunk,
        cuts=[[*accumulate(own, initial=n - sum(own))] for n, own in zip(total, counts.sum(2).tolist(), strict=True)],
        offsets=F.pad(counts.cumsum(2), (1, 0)).int(),
    )


def bounds_of(layers: Sequence[RaggedKV], cuts: Sequence[int]) -> Int64[Tensor, "L H c"]:
    """Returns the first row of each head at or after each of some tokens, ascending, the last one past all."""
    found, length = [], cuts[-1]
    for layer in layers:
        heads = torch.arange(layer.heads, device=layer.offsets.device)
        places = owners(layer.offsets, len(layer.positions)) * (length + 1) + layer.positions
        wanted = heads[:, None] * (length + 1) + torch.tensor(cuts, device=heads.device)
        found.append(torch.searchsorted(places, wanted))
    return torch.stack(found)


def blocks_of(
    bounds: Sequence[Sequence[Sequence[int]]],
    starts: Sequence[int],
    sizes: Sequence[int],
    depth: int,
    device: torch.device,
) -> list[list[Block]]:
    """Returns the blocks of each chunk, of `depth` layers each. A head without rows or with all has nothing to fit.

    Args:
        bounds: see `bounds_of`, with one token more than there are chunks.
        starts: how many rows the layers before each layer have.
        sizes: tokens of each chunk.
    """
    numbers: list[list[int]] = []
    parts: list[list[tuple[range, int, tuple[tuple[int, int], ...]]]] = []
    for c, size in enumerate(sizes):
        parts.append([])
        for at in range(0, len(bounds), depth):
            layers = range(at, min(at + depth, len(bounds)))
            own = [(n, h, head[c], head[c + 1] - head[c]) for n in layers for h, head in enumerate(bounds[n])]
            local = accumulate((count for *_, count in own), initial=0)
            found = [
                [i, (c * len(bounds) + n) * len(bounds[n]) + h, starts[n] + first, place, count]
                for i, ((n, h, first, count), place) in enumerate(zip(own, local, strict=False))
                if 0 < count < size
            ]
            found.sort(key=lambda line: (-line[-1], line[0]))
            numbers += found
            parts[c].append((layers, len(found), groups_of([line[-1] for line in found])))
    told = torch.tensor(numbers, dtype=torch.int64).reshape(-1, 5).T.contiguous().to(device)  # one copy for all
    columns = iter(told.split([count for chunk in parts for _, count, _ in chunk], dim=1))

    def block(layers: range, groups: tuple[tuple[int, int], ...]) -> Block:
        heads, slots, first, local, counts = next(columns)
        return Block(layers, heads, slots, first, local, counts, groups)

    return [[block(layers, groups) for layers, _, groups in chunk] for chunk in parts]


def groups_of(counts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Returns how many heads of descending lengths are padded together, and to which width."""
    groups: list[tuple[int, int]] = []
    for count in counts:
        width = width_of(count)
        number, own = groups[-1] if groups else (0, 0)
        if own == width and 4 * (number + 1) * width**2 <= TOGETHER:
            groups[-1] = (number + 1, width)
        else:
            groups.append((1, width))
    return tuple(groups)


def width_of(count: int) -> int:
    """Returns what a head of so many rows is padded to: the next of 8, 16, 24, 32, 48, 64, 96, ...

    So few that groups of other chunks have the same; a third more products than there are rows for is what they cost.
    """
    octave = 1 << max(3, (count - 1).bit_length())
    between = octave * 3 // 4
    return between if count <= between and between % 8 == 0 else octave
