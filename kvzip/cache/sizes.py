"""Bytes of a ragged cache before it is packed, from the numbers of rows that its heads would have."""

from collections.abc import Sequence
from itertools import accumulate

from ..ops.quantize import packed_nbytes
from ..ops.schedule import processors_of, schedule_nbytes
from .caches import DenseCache, check_whole, tensors_of
from .parts import WindowKV


def ragged_nbytes(
    cache: DenseCache,
    rows: Sequence[Sequence[int]],
    *,
    bits: tuple[int, int] | None = None,
    scales: Sequence[tuple[int, int]] = (),
    biases: bool = False,
) -> int:
    """Returns `nbytes` of the cache that keeps rows[l][h] pairs of head h of scored layer l, the prefix's counted.

    Args:
        bits: of keys and values, None if they are in the cache's dtype.
        scales: bytes of a scale of keys, and of values, in each scored layer, with bits.
        biases: whether rows have float16 biases, as `refit` gives them.

    Raises: ValueError if the cache was consumed.
    """
    check_whole(cache)
    windows = [layer for layer in cache.layers if isinstance(layer, WindowKV)]
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(windows)}
    size = sum(held.values()) + cache.token_ids.untyped_storage().nbytes()
    processors = processors_of(cache.device)
    for index, (layer, own) in enumerate(zip(cache.scored_layers, rows, strict=True)):
        k, count, bounds = cache.layers[layer].k, sum(own), [*accumulate(own, initial=0)]
        size += (4 + 2 * biases) * count + 4 * len(bounds) + schedule_nbytes(bounds, processors)
        if bits is None:
            size += 2 * count * k.shape[3] * k.element_size()
            continue
        for each, scale, heads in zip(bits, scales[index], (len(own), 0), strict=True):  # channels are the keys' alone
            size += packed_nbytes(count, k.shape[3], bits=each, scale=scale, heads=heads)
    return size
