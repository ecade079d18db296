"""Compression: scores to a keep mask to a ragged cache, layer by layer."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from . import checks, ops
from .cache import (
    DenseCache,
    DenseKV,
    RaggedCache,
    RaggedKV,
    Scores,
    WindowKV,
    check_whole,
    explain_out_of_memory,
    free_bytes,
)
from .checks import check_kind


def compress(
    cache: DenseCache,
    ratio: SupportsFloat | None = None,
    *,
    level: str = "pair",
    budget: SupportsFloat | None = None,
    threshold: SupportsFloat | None = None,
    protect: Sequence[tuple[int, int]] = (),
    min_rows: SupportsIndex = 0,
    sink: SupportsIndex = 0,
    recent: SupportsIndex = 0,
    bits: SupportsIndex | None = None,
    consume: bool = False,
) -> RaggedCache:
    """Returns a cache that holds only the highest scored pairs of the context; the rest are gone.

    The system prefix and window layers are always kept and do not count. Equal scores are kept in index order. Numbers
    may be of any type (numpy's, Fraction, Decimal, a tensor without axes); they become Python's first.

    Args:
        ratio: fraction of evictable pairs KEPT, 0 < ratio <= 1.
        level: where the budget is shared. "pair": int(ratio * L * H * E) over all layers and heads. "layer":
            int(ratio * H * E) in each layer. "uniform": int(ratio * E) in each head. "head": int(ratio * L * H) whole
            heads, by their highest score; the others keep protected and minimum rows, `sink` and `recent` only, which
            come on top of the ratio, so that `kept` exceeds it.
        budget: tokens per head on average, in place of a ratio: int(budget * L * H) pairs, at most all.
        threshold: keeps every pair with score >= threshold, in place of a ratio; level "pair" only.
        protect: (start, stop) spans of context tokens, 0 the first after the prefix, kept in all layers and heads.
        min_rows: pairs that every head keeps at least, its highest scored.
        sink, recent: first and last context tokens that dropped heads keep too, as DuoAttention's streaming heads do;
            level "head" only. The prefix stays in any case: DuoAttention counts it among its sink tokens, we do not.
            The last tokens are those of the context: they do not move on while a question is answered.
        bits: 8 or 4 packs the kept keys and values, prefix included, into that many bits (see `ops.quantize`); window
            layers and what follows the context stay as they are.
        consume: frees each dense layer as it is packed. `cache`, and every other that shares its pairs, cannot be used
            afterwards, and says so; interrupted before the first layer is freed, they are as they were.

    Protected and minimum rows are taken first, the rest by score.

    Raises: ValueError without scores, for NaN scores, unless exactly one of ratio, budget and threshold is given,
        or if more rows are protected than the budget has, or if kept pairs to pack into bits are not finite; TypeError
        for what is no number; torch.OutOfMemoryError that says what for, and whether the cache is intact.
    Source: KVzip, arXiv 2505.23416. The authors' code keeps strictly more than a threshold, which loses ties.
    """
    check_whole(cache)
    if cache.scores is None:
        raise ValueError("expected a cache with scores, got none: call kvzip.score(model, cache) first")
    scores = cache.scores
    bits = None if bits is None else checks.whole(bits, "bits")
    if bits not in (None, 8, 4):
        raise ValueError(f"expected bits of 8 or 4, or None for the cache's own dtype, got {bits}: pass one of them")
    keep, counts = _keep(
        scores,
        ratio,
        level=level,
        budget=budget,
        threshold=threshold,
        protect=protect,
        min_rows=min_rows,
        sink=sink,
        recent=recent,
    )
    context = _pack(cache, scores, keep, counts, bits=bits, consume=consume)
    return RaggedCache(
        context=context,
        tail=None,
        context_length=cache.length,
        start=cache.start,
        chat=cache.chat,
        token_ids=cache.token_ids,
        fingerprint=cache.fingerprint,
        kept=sum(map(sum, counts)),
        total=keep.numel(),
        scores=scores,
        method=f"{scores.source}/{level}",
    )


def keep_mask(
    scores: Scores,
    ratio: SupportsFloat | None = None,
    *,
    level: str = "pair",
    budget: SupportsFloat | None = None,
    threshold: SupportsFloat | None = None,
    protect: Sequence[tuple[int, int]] = (),
    min_rows: SupportsIndex = 0,
    sink: SupportsIndex = 0,
    recent: SupportsIndex = 0,
) -> Bool[Tensor, "L H E"]:
    """Returns which context pairs `compress` would keep, by its arguments; needs the scores alone, no pairs.

    `keep_mask(scores, 0.3).sum(-1)` is the number of each layer and head; any ratio, level or budget costs one
    selection and no forward pass.

    Raises: ValueError as `compress` does.
    """
    mask, _ = _keep(
        scores,
        ratio,
        level=level,
        budget=budget,
        threshold=threshold,
        protect=protect,
        min_rows=min_rows,
        sink=sink,
        recent=recent,
    )
    return mask


def _keep(
    scores: Scores,
    ratio: SupportsFloat | None,
    *,
    level: str,
    budget: SupportsFloat | None,
    threshold: SupportsFloat | None,
    protect: Sequence[tuple[int, int]],
    min_rows: SupportsIndex,
    sink: SupportsIndex,
    recent: SupportsIndex,
) -> tuple[Bool[Tensor, "L H E"], list[list[int]]]:
    """The mask, and on the host how many of each head it keeps."""
    threshold = None if threshold is None else checks.number(threshold, "threshold")
    count = budget_of(scores, ratio=ratio, budget=budget, threshold=threshold, level=level)
    nan = torch.zeros(1, dtype=torch.int32, device=scores.values.device)
    ends = _ends(scores, level, sink=sink, recent=recent)
    forced = _forced(scores, nan, protect=protect, min_rows=min_rows)
    if count is None:
        assert threshold is not None
        nan |= scores.values.isnan().any().int()
        keep = scores.values >= threshold
        keep = keep if forced is None else keep | forced
    else:
        keep = _select(scores.values, count, level, forced, nan)
    keep = keep if ends is None else keep | ends
    *flat, overflowed = torch.cat([keep.sum(-1).flatten(), nan]).tolist()  # the one wait for the device
    if overflowed:
        raise ValueError(
            "expected scores without NaN, got some: the model overflowed, score again in bfloat16 or float32"
        )
    return keep, [flat[i : i + keep.shape[1]] for i in range(0, len(flat), keep.shape[1])]


def budget_of(
    scores: Scores,
    *,
    ratio: SupportsFloat | None,
    budget: SupportsFloat | None,
    threshold: SupportsFloat | None,
    level: str,
) -> Callable[[int], int] | None:
    """Returns how many to keep of the pairs of n whole heads, as a function of n; None for a threshold.

    Raises: ValueError and TypeError as `compress` does.
    """
    check_kind(scores, Scores)
    if sum(x is not None for x in (ratio, budget, threshold)) != 1:
        raise ValueError(
            f"expected exactly one of ratio, budget and threshold, got ratio={ratio}, budget={budget}, "
            f"threshold={threshold}: pass ratio=0.3 to keep 30%"
        )
    if level not in ("pair", "layer", "uniform", "head"):
        raise ValueError(f"expected level 'pair', 'layer', 'uniform' or 'head', got {level!r}: pass one of them")
    evictable = scores.values.shape[2]
    if ratio is not None:
        fraction = checks.kept_ratio(ratio)
        if level == "head":
            return lambda heads: int(fraction * heads) * evictable
        return lambda heads: int(fraction * (heads * evictable))
    if budget is not None:
        tokens = checks.number(budget, "budget", finite=False)  # infinitely many are all
        if not tokens > 0:
            raise ValueError(f"expected a budget above 0 tokens per head, got {tokens}: budget=1000 keeps as many")
        return lambda heads: int(min(tokens * heads, heads * evictable))
    if level != "pair":
        raise ValueError(f"expected level 'pair' with a threshold, got {level!r}: a threshold has no budget to share")
    return None


def _ends(scores: Scores, level: str, *, sink: SupportsIndex, recent: SupportsIndex) -> Bool[Tensor, " E"] | None:
    """The tokens that dropped heads keep, as DuoAttention's streaming heads do; None where there are none."""
    sink, recent = checks.whole(sink, "sink", least=0), checks.whole(recent, "recent", least=0)
    if not sink and not recent:
        return None
    if level != "head":
        raise ValueError(
            f"expected level 'head' with sink and recent, got {level!r}: no other level drops whole heads; use protect="
        )
    token = torch.arange(scores.values.shape[2], device=scores.values.device)
    return (token < min(sink, len(token))) | (token >= len(token) - min(recent, len(token)))


def _forced(
    scores: Scores, nan: Tensor, *, protect: Sequence[tuple[int, int]], min_rows: SupportsIndex
) -> Bool[Tensor, "L H E"] | None:
    """The pairs kept whatever their score, or None where there are none."""
    evictable, min_rows = scores.values.shape[2], checks.whole(min_rows, "min_rows")
    spans = protected_spans(protect, evictable)
    if not spans and not min_rows:
        return None
    if not 0 <= min_rows <= evictable:
        raise ValueError(
            f"expected 0 <= min_rows <= {evictable} (context tokens), got {min_rows}: no head has more rows to keep"
        )
    forced = ops.select_uniform_count(scores.values, count=min_rows, nan=nan)
    for start, stop in spans:
        forced[:, :, start:stop] = True
    return forced


def protected_spans(protect: Sequence[tuple[int, int]], evictable: int | None) -> list[tuple[int, int]]:
    """Returns the spans of `compress(protect=)`, checked. `evictable`: how many context tokens there are, if known."""
    try:
        listed = list(protect)
    except TypeError:
        raise TypeError(
            "expected protect to list (start, stop) pairs of context tokens, got "
            f"{type(protect).__name__}: protect=[(0, 9)]"
        ) from None
    spans = []
    for span in listed:
        try:
            start, stop = (checks.whole(end, "a token") for end in span)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"expected protect to list (start, stop) pairs of context tokens, got {span!r} in it: protect=[(0, 9)]"
            ) from error
        if not 0 <= start <= stop or (evictable is not None and stop > evictable):
            within = "0 and up" if evictable is None else f"[0, {evictable}]"
            raise ValueError(
                f"expected protected spans within {within} (context tokens), got ({start}, {stop}): "
                "0 is the first token after the system prefix"
            )
        spans.append((start, stop))
    return spans


def _select(
    values: Float32[Tensor, "L H E"],
    budget: Callable[[int], int],
    level: str,
    forced: Bool[Tensor, "L H E"] | None,
    nan: Tensor,
) -> Bool[Tensor, "L H E"]:
    layers, heads, evictable = values.shape
    if level == "head":
        whole = budget(layers * heads) // evictable
        keep = _highest(values.amax(-1, keepdim=True), whole, nan).expand_as(values)
        return keep if forced is None else keep | forced
    sharing = {"pair": layers * heads, "layer": heads, "uniform": 1}[level]
    count = budget(sharing)
    if forced is not None:
        needed = int(forced.reshape(-1, sharing * evictable).sum(-1).max())
        if needed > count:
            raise ValueError(
                f"expected at most {count} protected and minimum rows (the budget of level {level!r}), got {needed}: "
                "raise the ratio or the budget, or protect less"
            )
        values = values.clamp(max=torch.finfo(torch.float32).max).masked_fill(forced, torch.inf)
    if level == "uniform":
        return ops.select_uniform_count(values, count=count, nan=nan)
    parts = [values] if level == "pair" else list(values.split(1))
    return torch.cat([_highest(part, count, nan) for part in parts])


def _highest(values: Float32[Tensor, "L H E"], count: int, nan: Tensor) -> Bool[Tensor, "L H E"]:
    mask = ops.select_count(values, count=count, nan=nan)
    assert isinstance(mask, Tensor)
    return mask


def _pack(
    cache: DenseCache,
    scores: Scores,
    keep: Bool[Tensor, "L H E"],
    counts: list[list[int]],
    *,
    bits: int | None,
    consume: bool,
) -> tuple[RaggedKV | WindowKV, ...]:
    """Packs the kept pairs of each layer, counts[l][h] of each head, the prefix in front of them.

    Consuming takes all layers out of the cache at once, so that whatever interrupts it leaves a cache that is whole or
    says that it is not. They are put back if none was freed. The largest is packed first: if there is room for it,
    there is for the others, because a packed layer is never larger than the one that is freed for it.
    """
    layers: list[Any] = list(cache.layers)
    scored = [n for n, layer in enumerate(layers) if isinstance(layer, DenseKV)]
    keys = layers[scored[0]].k
    pair = 2 * keys.shape[-1] * keys.element_size()
    sizes = [pair * (sum(kept) + scores.start * len(kept)) for kept in counts]
    # consuming frees a layer before the next is packed, so that one packed layer at a time is all that is added
    needed = max(sizes) if consume else sum(sizes)
    explanation = f"{needed:,} bytes for the kept pairs" + (" of the largest layer" if consume else "")
    remedy = "keep less (ratio, bits=8 or 4)" + ("" if consume else ", or pass consume=True")
    if consume:  # what can be known is said before the first layer is gone
        free = free_bytes(keys.device)
        if free is not None and free < needed:
            raise torch.OutOfMemoryError(
                f"expected room for {explanation}, got {free:,} bytes free: {remedy}; the cache is intact"
            )
        if bits is not None:
            _check_finite([layers[n] for n in scored], keep, scores)
    del keys
    context: list[Any] = [layer if isinstance(layer, WindowKV) else None for layer in layers]
    try:
        if consume:
            cache.layers.clear()
        for at in sorted(range(len(scored)), key=sizes.__getitem__, reverse=True):
            n = scored[at]
            state = "the cache's pairs are gone, prefill again" if None in layers else "the cache is intact"
            with explain_out_of_memory(explanation, f"{remedy}; {state}"):
                context[n] = _pack_layer(layers[n], keep[at], counts[at], scores.start, bits)
            if consume:
                layers[n] = None  # not before it is packed
    except BaseException:
        if consume and None not in layers:
            cache.layers[:] = layers
        raise
    return tuple(context)


def _check_finite(layers: list[DenseKV], keep: Bool[Tensor, "L H E"], scores: Scores) -> None:
    """Raises ValueError for a kept pair that is not finite, which no scale fits: one pass, one wait for the device."""
    ends = torch.stack([torch.stack(x.aminmax()) for layer in layers for x in (layer.k, layer.v)])
    for n in set((~ends.isfinite()).any(1).nonzero()[:, 0].floor_divide(2).tolist()):
        layer, mask = layers[n], torch.nn.functional.pad(keep[n], (scores.start, 0), value=True)
        if not (layer.k[0][mask].isfinite().all() and layer.v[0][mask].isfinite().all()):
            raise ValueError(
                f"expected finite keys and values to pack into bits, got inf or NaN in layer {scores.layers[n]}: check "
                "the forward pass that made them; the cache is intact"
            )


def _pack_layer(layer: DenseKV, mask: Bool[Tensor, "H E"], kept: list[int], start: int, bits: int | None) -> RaggedKV:
    bounds = [0, *itertools.accumulate(start + count for count in kept)]
    prefix = mask.new_ones(mask.shape[0], start)
    k, v, offsets, positions = ops.prune(layer.k[0], layer.v[0], torch.cat([prefix, mask], dim=1), total=bounds[-1])
    if bits is not None:
        k, v = ops.quantize(k, bits=bits, offsets=offsets), ops.quantize(v, bits=bits)
    return RaggedKV(k, v, offsets, positions, ops.decode_schedule(offsets, bounds=bounds))
