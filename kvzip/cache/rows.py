"""Rows of ragged layers: which head owns each, which tokens they hold, and layers with fewer or more of them."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from .. import ops
from ..ops.types import LARGEST, Channels, Quantized, owners
from ..parallel import everyone
from .caches import DenseCache, RaggedCache, check_cache
from .parts import RaggedKV

KeyShape = tuple[Channels, Float32[Tensor, "H D D"]]
"""Channels of the keys of a layer, and what `ops.shape_feedback` gives for them."""


def first_rows(layer: RaggedKV, count: int) -> Int64[Tensor, "H n"]:
    """Returns the indices of the first `count` rows of every head; with count=start, those of the prefix."""
    return layer.offsets[:-1, None].long() + torch.arange(count, device=layer.offsets.device)


def prefix_keys(layer: RaggedKV, start: int, dtype: torch.dtype) -> Float[Tensor, "H A D"]:
    """Returns the keys of the system prefix, which are the first `start` rows of every head."""
    rows = first_rows(layer, start)
    if isinstance(layer.k, Tensor):
        return layer.k[rows]
    offsets = torch.arange(len(rows) + 1, device=rows.device).int() * start
    keys = ops.dequantize(ops.take_rows(layer.k, rows.flatten()), dtype=dtype, offsets=offsets)
    return rearrange(keys, "(h a) d -> h a d", h=len(rows))


def kept_mask(cache: DenseCache | RaggedCache) -> Bool[Tensor, "L H E"]:
    """Returns which context pairs a cache holds, by scored layer, head and token after the prefix, on the CPU.

    Where ranks share the model every one must call it; the heads are those of all.
    """
    check_cache(cache)
    layers = [cache.context[n] for n in cache.scored_layers]
    mask = torch.ones(len(layers), cache.heads if layers else 0, cache.context_length, dtype=torch.bool)
    for kept, layer in zip(mask, layers, strict=True):
        if isinstance(layer, RaggedKV):
            kept.fill_(False)
            kept[owners(layer.offsets, len(layer.positions)).cpu(), layer.positions.long().cpu()] = True
    if cache.share is not None:
        masks = everyone(cache.share, mask)
        mask = torch.cat([masks[rank] for rank in cache.share.speakers], 1)
    return mask[:, :, cache.start :]


def ranked(
    values: Float32[Tensor, "*L H E"], spans: tuple[tuple[int, int], ...] = (), *, first: int = 0
) -> Float32[Tensor, "*L H E"]:
    """Returns the ranks by which pairs are kept: their scores, made infinite in protected spans and finite elsewhere.

    Spans count context tokens; the values begin with context token `first`.
    """
    ranks = values.clamp(max=LARGEST)
    for begin, end in spans:
        ranks[..., max(0, begin - first) : max(0, end - first)] = torch.inf
    return ranks


def of_rows(layer: RaggedKV, ranks: Float32[Tensor, "H E"], start: int) -> Float32[Tensor, " N"]:
    """Returns the rank of each row, looked up by its head and token; infinite for rows of the prefix."""
    rows = torch.full(layer.positions.shape, torch.inf, device=layer.positions.device)
    own = layer.positions >= start
    heads = owners(layer.offsets, len(layer.positions))
    rows[own] = ranks.to(rows.device)[heads[own], layer.positions[own].long() - start]
    return rows


def pack(
    k: Float[Tensor, "H S D"],
    v: Float[Tensor, "H S D"],
    keep: Bool[Tensor, "H S"],
    counts: list[int],
    *,
    bits: tuple[int, int] | None = None,
    asked: Float32[Tensor, "H D D"] | None = None,
    flags: list[Tensor] | None = None,
) -> RaggedKV:
    """Returns the ragged layer of the tokens to keep, counts[h] of them for head h.

    Args:
        bits: of keys and of values, to quantize them, see `narrow`.
        asked: the second moments of the queries of each head, by which keys in 4 or 2 bits are rounded.
        flags: see `narrow`.
    """
    bounds = [0, *itertools.accumulate(counts)]
    k, v, offsets, positions = ops.prune(k, v, keep, total=bounds[-1])
    layer = RaggedKV(k, v, offsets, positions, ops.decode_schedule(offsets, bounds=bounds))
    if bits is None:
        return layer
    shape = None if asked is None or bits[0] == 8 else shape_keys([layer], asked[None], bits=bits[0])[0]
    return narrow(layer, bits=bits, shape=shape, flags=flags)


def shape_keys(layers: Sequence[RaggedKV], asked: Float32[Tensor, "L H D D"], *, bits: int) -> list[KeyShape]:
    """Returns how to round the keys of each layer to 4 or 2 bits by the queries that were asked.

    What is computed of these is computed for all layers at once: it is many small steps, each as long for one layer as
    for many. The host does not wait for the device.
    """
    channels = []
    for layer in layers:
        assert isinstance(layer.k, Tensor)
        channels.append(ops.measure_channels_turned(layer.k, layer.offsets, bits=bits))
    feedback = ops.shape_feedback(asked, torch.stack([own.spread for own in channels]))
    return list(zip(channels, feedback.unbind(), strict=True))


def narrow(
    layer: RaggedKV, *, bits: tuple[int, int], shape: KeyShape | None = None, flags: list[Tensor] | None = None
) -> RaggedKV:
    """Returns a layer that is not quantized in so many bits of keys and of values.

    Keys in 4 or 2 bits are turned, and so are values in 2 (in 4 it would gain values less than it costs to turn answers
    back).

    Args:
        shape: from `shape_keys`; without it keys in 4 or 2 bits are rounded to the nearest.
        flags: gets what the device finds of rows that are turned, see `ops.quantize_turned_ahead`; without it the host
            waits for that, and so it always does for rows that are not turned.
    """
    assert isinstance(layer.k, Tensor)
    assert isinstance(layer.v, Tensor)
    run: Any = ops.quantize_turned if flags is None else partial(_ahead, flags)
    if bits[0] < 8:
        channels, feedback = shape or (ops.measure_channels_turned(layer.k, layer.offsets, bits=bits[0]), None)
        keys = run(layer.k, bits=bits[0], offsets=layer.offsets, channels=channels, feedback=feedback)
    else:
        keys = ops.quantize(layer.k, bits=bits[0], offsets=layer.offsets)
    values = run(layer.v, bits=bits[1]) if bits[1] < 4 else ops.quantize(layer.v, bits=bits[1])
    return replace(layer, k=keys, v=values)


def _ahead(flags: list[Tensor], x: Tensor, **options: Any) -> Quantized:
    rows, found = ops.quantize_turned_ahead(x, **options)
    flags.append(found)
    return rows


def take(layer: RaggedKV, keep: Bool[Tensor, " N"]) -> RaggedKV:
    """Returns a layer with only the rows marked in `keep`."""
    counts = torch.bincount(owners(layer.offsets, len(keep))[keep], minlength=layer.heads)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    k, v = (x[keep] if isinstance(x, Tensor) else ops.take_rows(x, keep) for x in (layer.k, layer.v))
    bias = None if layer.bias is None else layer.bias[keep]
    return RaggedKV(k, v, offsets, layer.positions[keep], ops.decode_schedule(offsets), bias)


def join(layer: RaggedKV, more: RaggedKV) -> RaggedKV:
    """Returns a layer whose heads have their own rows first, then those of `more`, which are not quantized.

    If the layer is quantized, the new rows are too, in its format. If one of the two has biases, the other's rows get
    bias 0.
    """
    old = torch.arange(len(layer.positions), device=layer.offsets.device)
    old += more.offsets[owners(layer.offsets, len(layer.positions))]
    new = torch.arange(len(more.positions), device=layer.offsets.device)
    new += layer.offsets[owners(more.offsets, len(more.positions)) + 1]

    def put(x: Tensor, y: Tensor) -> Tensor:
        out = x.new_empty(len(x) + len(y), *x.shape[1:], dtype=torch.promote_types(x.dtype, y.dtype))
        out[old], out[new] = x.to(out.dtype), y.to(out.dtype)
        return out

    def rows(x: Tensor | Quantized, y: Tensor | Quantized) -> Tensor | Quantized:
        assert isinstance(y, Tensor)
        if isinstance(x, Tensor):
            return put(x, y)
        z = ops.quantize_like(y, x, offsets=more.offsets)
        return replace(x, codes=put(x.codes, z.codes), scale=put(x.scale, z.scale), zero=put(x.zero, z.zero))

    k, v, positions = rows(layer.k, more.k), rows(layer.v, more.v), put(layer.positions, more.positions)
    offsets, bias = layer.offsets + more.offsets, None
    if layer.bias is not None or more.bias is not None:
        bias = put(*(biases(x, like=y) for x, y in ((layer, more), (more, layer))))
    return RaggedKV(k, v, offsets, positions, ops.decode_schedule(offsets), bias)


def biases(layer: RaggedKV, *, like: RaggedKV | None = None) -> Float[Tensor, " N"]:
    """Returns the bias of each row of a layer; zeros where it has none, in the dtype that `like` has."""
    if layer.bias is not None:
        return layer.bias
    dtype = torch.float16 if like is None or like.bias is None else like.bias.dtype
    return torch.zeros(len(layer.positions), dtype=dtype, device=layer.positions.device)


def interleave(held: Tensor, new: Any, sizes: list[int]) -> list[Tensor]:
    """Returns what belongs to the rows that a head held, then what belongs to its new ones, new[h], head after head.

    `sizes` are the numbers of rows in that order.
    """
    return [part for pair in zip(held.split(sizes[::2]), new, strict=True) for part in pair]


def gather(
    parts: tuple[Float[Tensor, "N D"], Float[Tensor, "H S D"]], rows: list[Tensor], sizes: list[int]
) -> Float[Tensor, "M D"]:
    """Returns the rows with these indices: of each head those that it held, then its new ones (see `interleave`)."""
    held, new = parts
    out = held.new_empty(sum(map(len, rows)), held.shape[1])
    for part, index, place in zip(interleave(held, new, sizes), rows, out.split([len(r) for r in rows]), strict=True):
        torch.index_select(part, 0, index, out=place)
    return out
