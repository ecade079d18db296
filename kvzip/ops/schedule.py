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
    sms = processors_of(offsets.device) if processors is None else processors
    bounds = offsets.tolist() if bounds is None else bounds
    lists = [values for target in _targets(bounds, sms) for values in _cut(bounds, target)]
    # one copy to the device for all; kernels want tables that start at multiples of 16 bytes
    flat = [x for values in lists for x in (*values, *[0] * (-len(values) % 4))]
    sizes = [aligned(len(values)) for values in lists]
    padded = torch.tensor(flat, dtype=torch.int32).to(offsets.device).split(sizes)
    tables = [table[: len(values)] for table, values in zip(padded, lists, strict=True)]
    cuts = zip(tables[::2], tables[1::2], strict=True)
    return DecodeSchedule(tuple(Splits(table.view(-1, 3), first) for table, first in cuts), sms)


def schedule_nbytes(bounds: list[int], processors: int) -> int:
    """Returns the bytes of the tables that `decode_schedule` makes, without making them."""
    tiles = _tiles(bounds)
    cuts = [sum(-(-n // _length(tiles, target)) for n in tiles) for target in _targets(bounds, processors)]
    return 4 * sum(aligned(3 * count) + aligned(len(bounds)) for count in cuts)


def processors_of(device: torch.device) -> int:
    """Returns the SMs of a device; 8 of a CPU, whose schedules nothing reads."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _targets(bounds: list[int], sms: int) -> list[int]:
    """How many splits each cut may have."""
    targets = [8 * sms, 4 * sms, 2 * sms, sms]
    while targets[-1] // 2 >= len(bounds):
        targets.append(targets[-1] // 2)
    return [*targets, 0]  # one split per head


def aligned(count: int) -> int:
    """So many 32-bit numbers, and those that follow them so that the next ones begin at a multiple of 16 bytes."""
    return -(-count // 4) * 4


def _tiles(bounds: list[int]) -> list[int]:
    return [-(-(stop - begin) // TILE) for begin, stop in itertools.pairwise(bounds)]


def _length(tiles: list[int], target: int) -> int:
    """The fewest tiles of a split with which there are at most `target` splits, or one per head."""
    target = max(target, sum(n > 0 for n in tiles))
    low, high = _SHORTEST, max(_SHORTEST, *tiles)
    while low < high:
        middle = (low + high) // 2
        if sum(-(-n // middle) for n in tiles) <= target:
            high = middle
        else:
            low = middle + 1
    return low


def _cut(bounds: list[int], target: int) -> tuple[list[int], list[int]]:
    """Cuts heads into equal splits of whole tiles, as short as `target` splits in all allow; at least one per head.

    Returns (head, first row, row after the last) of one split after the other, and each head's first split.
    """
    tiles = _tiles(bounds)
    length, splits, first = _length(tiles, target), [], [0]
    for h, n in enumerate(tiles):
        count = -(-n // length)
        for i in range(count):
            begin, end = bounds[h] + TILE * (n * i // count), bounds[h] + TILE * (n * (i + 1) // count)
            splits += [h, begin, min(end, bounds[h + 1])]
        first.append(first[-1] + count)
    return splits, first
