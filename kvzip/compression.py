"""Compression: scores to a keep mask to a ragged cache, layer by layer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Bool
from torch import Tensor

from . import options
from .cache import DenseCache, RaggedCache, RaggedKV, Scores, WindowKV, check_whole, explain_out_of_memory, free_bytes
from .cache.caches import ragged_of
from .cache.rows import KeyShape, narrow, pack, shape_keys
from .checks import check_kind
from .choosing import keep_bytes, keep_pairs
from .parallel import together

LAYERS_AT_ONCE = 8  # whose kept rows are held in 16 bits beside a dense cache that stays


def compress(
    cache: DenseCache,
    ratio: SupportsFloat | None = None,
    *,
    level: str = "pair",
    budget: SupportsFloat | None = None,
    budget_bytes: SupportsIndex | None = None,
    threshold: SupportsFloat | None = None,
    protect: Sequence[tuple[int, int]] = (),
    min_rows: SupportsIndex = 0,
    floor: SupportsFloat = 0.0,
    sink: SupportsIndex = 0,
    recent: SupportsIndex = 0,
    bits: SupportsIndex | tuple[SupportsIndex, SupportsIndex] | None = None,
    biases: bool = False,
    consume: bool = False,
) -> RaggedCache:
    """Returns a cache that holds only the highest scored pairs of the context; the rest are gone.

    The system prefix and window layers are always kept and do not count. Protected and minimum rows are taken first,
    the rest by score, equal scores in index order. Numbers may be of any type (numpy's, Fraction, Decimal, a
    zero-dimensional tensor); they are converted to Python's.

    Args:
        ratio: fraction of evictable pairs KEPT, 0 < ratio <= 1.
        level: where the budget is shared. "pair": int(ratio * L * H * E) over all layers and heads. "layer":
            int(ratio * H * E) in each layer. "uniform": int(ratio * E) in each head. "head": int(ratio * L * H) whole
            heads, by their highest score; dropped heads keep only protected and minimum rows, `sink` and `recent`,
            which come on top of the ratio, so `kept` may exceed it.
        budget: tokens per head on average, in place of a ratio: int(budget * L * H) pairs, at most all.
        budget_bytes: in place of a ratio, keeps as many pairs as fit: `kvzip.nbytes` of the result is at most so many
            bytes, prefix, window layers, token ids and all metadata counted, and with one pair more (level "pair"; one
            in each layer, one in each head, or one head) it would be more.
        threshold: keeps every pair with score >= threshold, in place of a ratio; level "pair" only.
        protect: (start, stop) spans of context tokens, 0 the first after the prefix, kept in all layers and heads.
        min_rows: pairs that every head keeps at least, its highest scored.
        floor: part, from 0 to 1, of an equal share of the budget that every head keeps at least, its highest scored;
            the rest is shared by `level`, which is not "head". `docs/refitting.md` measures 0.2.
        sink, recent: number of first and last context tokens that dropped heads keep too, as DuoAttention's streaming
            heads do; level "head" only. The prefix is always kept and not counted in `sink`; DuoAttention counts it.
            `recent` counts from the end of the context: it does not slide while a question is answered.
        bits: 8, 4 or 2 quantizes the kept keys and values, prefix included, to that many bits, and (4, 2) keys to 4 and
            values to 2; window layers and the tail stay as they are. Rows in 8 bits and values in 4 are those of
            `ops.quantize`, keys in 4 or 2 and values in 2 those of `ops.quantize_turned`, keys rounded by the queries
            of `score` where the scores have them. See `docs/bits.md`.
        biases: with budget_bytes, leaves room for the biases that `kvzip.refit` will give the rows.
        consume: frees each dense layer once it is packed. Using `cache` afterwards, or another that shares its pairs,
            raises an error. If packing fails before the first layer is freed, they are unchanged.

    Raises: ValueError without scores, for NaN scores, unless exactly one of ratio, budget, budget_bytes and threshold
        is given, if more rows are protected than the budget allows, if bytes do not suffice for what is always kept, or
        if kept pairs to quantize are not finite; TypeError for what is no number; torch.OutOfMemoryError that says what
        needed the memory, and whether the cache is intact.
    Source: KVzip, arXiv 2505.23416. The authors' code keeps only scores strictly above its threshold, which drops ties.
    """
    check_whole(cache)
    if cache.scores is None:
        raise ValueError("expected a cache with scores, got none: call kvzip.score(model, cache) first")
    packed = options.bits(bits, cache.layers[0].width)
    chosen = options.budget(
        ratio, level, budget, threshold, protect, min_rows, sink, recent, floor, budget_bytes, biases
    )
    if chosen.budget_bytes is None:
        keep, counts = keep_pairs(cache.scores, chosen)
    else:
        keep, counts = keep_bytes(cache, chosen, bits=packed)
    context = _pack(cache, keep, counts, bits=packed, consume=consume)
    method = f"{cache.scores.source}/{level}"
    cache = replace(cache, scores=replace(cache.scores, asked=None)) if cache.scores.asked is not None else cache
    return ragged_of(cache, context, kept=sum(map(sum, counts)), total=keep.numel(), method=method)


def keep_mask(
    scores: Scores,
    ratio: SupportsFloat | None = None,
    *,
    level: str = "pair",
    budget: SupportsFloat | None = None,
    threshold: SupportsFloat | None = None,
    protect: Sequence[tuple[int, int]] = (),
    min_rows: SupportsIndex = 0,
    floor: SupportsFloat = 0.0,
    sink: SupportsIndex = 0,
    recent: SupportsIndex = 0,
) -> Bool[Tensor, "L H E"]:
    """Returns which context pairs `compress` would keep with the same arguments. It needs only the scores, no pairs.

    `keep_mask(scores, 0.3).sum(-1)` counts the kept pairs of each layer and head. A call costs one selection and no
    forward pass.

    Raises: ValueError as `compress` does.
    """
    check_kind(scores, Scores)
    chosen = options.budget(ratio, level, budget, threshold, protect, min_rows, sink, recent, floor)
    return keep_pairs(scores, chosen)[0]


def _pack(
    cache: DenseCache,
    keep: Bool[Tensor, "L H E"],
    counts: list[list[int]],
    *,
    bits: tuple[int, int] | None,
    consume: bool,
) -> tuple[RaggedKV | WindowKV, ...]:
    """Packs the kept pairs of each layer behind its prefix; head h of scored layer l keeps counts[l][h] of them.

    Mask and counts are of all heads, layers of those that are here.

    With `consume` each layer is freed once it is packed. The cache's list is emptied before the first layer is packed,
    and filled again if an error comes before one is freed: a cache is whole or known to be consumed. The largest is
    packed first: a packed layer is never larger than the dense one freed for it, so if the largest fits, the rest do.

    Where keys are rounded by the queries, the rows of several layers, with `consume` of all, are taken first and put
    into bits then, because what rounding needs takes as long for one layer as for many (`shape_keys`).
    """
    layers: list[Any] = list(cache.layers)
    scores = cache.scores
    assert scores is not None
    here = slice(None) if cache.share is None else cache.share.own
    rows = [[scores.start + count for count in heads[here]] for heads in counts]
    keep = keep[:, here]
    pair = 2 * layers[0].width * layers[0].k.element_size()
    sizes = [pair * sum(heads) for heads in rows]
    needed = max(sizes) if consume else sum(sizes)
    explanation = f"{needed:,} bytes for the kept pairs" + (" of the largest layer" if consume else "")
    remedy = "keep less (ratio, bits=8, 4 or 2)" + ("" if consume else ", or pass consume=True")
    if consume:  # before the list is emptied, so that these errors leave the cache intact
        with together(cache.share):
            free = free_bytes(cache.device)
            if free is not None and free < needed:
                raise torch.OutOfMemoryError(
                    f"expected room for {explanation}, got {free:,} bytes free: {remedy}; the cache is intact"
                )
            if bits is not None:
                _check_finite(cache, scores, keep)
    context: list[Any] = [layer if isinstance(layer, WindowKV) else None for layer in layers]
    found: list[tuple[int, int, list[Tensor]]] = []
    held: dict[int, tuple[RaggedKV, KeyShape]] = {}
    order = sorted(enumerate(cache.scored_layers), key=lambda place: sizes[place[0]], reverse=True)
    asked = scores.asked if bits is not None and bits[0] < 8 else None
    step = 1 if asked is None else len(order) if consume else LAYERS_AT_ONCE

    @contextmanager
    def explained() -> Iterator[None]:
        state = "the cache's pairs are gone, prefill again" if None in layers else "the cache is intact"
        with together(cache.share), explain_out_of_memory(explanation, f"{remedy}; {state}"):
            yield

    try:
        if consume:
            cache.layers.clear()
        for first in range(0, len(order), step):
            group = order[first : first + step]
            for at, n in group:
                flags = None if consume else []
                with explained():
                    whole = torch.nn.functional.pad(keep[at], (scores.start, 0), value=True)
                    own_bits = bits if asked is None else None
                    context[n] = pack(layers[n].k[0], layers[n].v[0], whole, rows[at], bits=own_bits, flags=flags)
                found.append((at, n, [] if flags is None else flags))
                if consume:
                    layers[n] = None
            if asked is not None and bits is not None:
                with explained():
                    own = asked[[at for at, _ in group]]
                    shapes = shape_keys([context[n] for _, n in group], own, bits=bits[0])
                    free = free_bytes(asked.device) if consume else None
                    ahead = not consume or (free is not None and free >= sum(sizes))
                for (_, n), shape, (*_, flags) in zip(group, shapes, found[first:], strict=True):
                    with explained():
                        if consume and ahead:  # there is room to hold its rows until it is known that they are packed
                            held[n] = (context[n], shape)
                        context[n] = narrow(context[n], bits=bits, shape=shape, flags=flags if ahead else None)
        for at, n in _again(found):  # with what the device found, which no layer waited for
            if n in held and bits is not None:
                context[n] = narrow(held[n][0], bits=bits, shape=held[n][1])
                continue
            whole = torch.nn.functional.pad(keep[at], (scores.start, 0), value=True)
            own = None if asked is None else asked[at]
            context[n] = pack(layers[n].k[0], layers[n].v[0], whole, rows[at], bits=bits, asked=own)
    except BaseException:
        if consume and None not in layers:
            cache.layers[:] = layers
        raise
    return tuple(context)


def _again(found: list[tuple[int, int, list[Tensor]]]) -> list[tuple[int, int]]:
    """Layers, as scored and as the model's, to be packed once more: scales are too coarse, or values not finite."""
    flags = [flag for *_, own in found for flag in own]
    if not flags:
        return []
    raised = iter(torch.stack(flags).any(1).tolist())
    return [(at, n) for at, n, own in found if any([next(raised) for _ in own])]


def _check_finite(cache: DenseCache, scores: Scores, keep: Bool[Tensor, "L H E"]) -> None:
    """Raises ValueError for a kept pair with inf or NaN, which no scale can represent. One wait if there is none."""
    layers = [cache.layers[n] for n in cache.scored_layers]
    ends = torch.stack([torch.stack(x.aminmax()) for layer in layers for x in (layer.k, layer.v)])
    for n in set((~ends.isfinite()).any(1).nonzero()[:, 0].floor_divide(2).tolist()):
        mask = torch.nn.functional.pad(keep[n], (scores.start, 0), value=True)
        if not all(x[0][mask].isfinite().all() for x in (layers[n].k, layers[n].v)):
            raise ValueError(
                f"expected finite keys and values to pack into bits, got inf or NaN in layer {scores.layers[n]}: check "
                "the forward pass that made them; the cache is intact"
            )
