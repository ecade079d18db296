"""How decoding cuts ragged heads into splits that keep every SM busy."""

import itertools

import torch
from jaxtyping import Int32
from torch import Tensor

from kvzip.ops.types import DecodeSchedule, Splits

TILE = 64  # rows that a kernel takes at a time: a partly filled tile costs as much as a full one
_SHORTEST = 2  # tiles of a split; below this, merging partial results costs more than a longer loop


def decode_schedule(
    offsets: Int32[Tensor, " H1"], *, processors: int | None = None, bounds: list[int] | None = None
) -> DecodeSchedule:
    """Returns how to cut heads that end at `offsets`; made once per layer of a cache.

    Args:
        processors: SMs (streaming multiprocessors) to fill; None asks the device of `offsets`, and takes 8 on a CPU.
        bounds: the values of `offsets` where the host knows them; None reads them, which waits for the device.
    """
    sms = processors_of(offsets) if processors is None else processors
    bounds = offsets.tolist() if bounds is None else bounds
    targets = [8 * sms, 4 * sms, 2 * sms, sms]
    while targets[-1] // 2 >= len(bounds):
        targets.append(targets[-1] // 2)
    targets.append(0)  # one split per head
    lists = [values for target in targets for values in _cut(bounds, target)]
    # one copy to the device for all; kernels want tables that start at multiples of 16 bytes
    flat = [x for values in lists for x in (*values, *[0] * (-len(values) % 4))]
    sizes = [-(-len(values) // 4) * 4 for values in lists]
    padded = torch.tensor(flat, dtype=torch.int32).to(offsets.device).split(sizes)
    tables = [table[: len(values)] for table, values in zip(padded, lists, strict=True)]
    cuts = zip(tables[::2], tables[1::2], strict=True)
    return DecodeSchedule(tuple(Splits(table.view(-1, 3), first) for table, first in cuts), sms)


def processors_of(x: Tensor) -> int:
    """SMs of x's device; 8 stand for them on a CPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8


def _cut(bounds: list[int], target: int) -> tuple[list[int], list[int]]:
    """Cuts heads into equal splits of whole tiles, as short as `target` splits in all allow; at least one per head.

    Returns (head, first row, row after the last) of one split after the other, and each head's first split.
    """
    tiles = [-(-(stop - begin) // TILE) for begin, stop in itertools.pairwise(bounds)]
    target = max(target, sum(n > 0 for n in tiles))
    low, high = _SHORTEST, max(_SHORTEST, *tiles)
    while low < high:
        middle = (low + high) // 2
        if sum(-(-n // middle) for n in tiles) <= target:
            high = middle
        else:
            low = middle + 1
    splits, first = [], [0]
    for h, n in enumerate(tiles):
        count = -(-n // low)
        for i in range(count):
            begin, end = bounds[h] + TILE * (n * i // count), bounds[h] + TILE * (n * (i + 1) // count)
            splits += [h, begin, min(end, bounds[h + 1])]
        first.append(first[-1] + count)
    return splits, first
