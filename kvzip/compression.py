"""Compression: scores to a keep mask to a ragged cache, layer by layer."""

import itertools
import operator
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from . import ops
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
from .checks import check_kind, check_real_number


def compress(
    cache: DenseCache,
    ratio: float | None = None,
    *,
    level: str = "pair",
    budget: float | None = None,
    threshold: float | None = None,
    protect: Sequence[tuple[int, int]] = (),
    min_rows: int = 0,
    sink: int = 0,
    recent: int = 0,
    bits: int | None = None,
    consume: bool = False,
) -> RaggedCache:
    """Returns a cache that holds only the highest scored pairs of the context; the rest are gone.

    The system prefix and window layers are always kept and do not count. Equal scores are kept in index order.

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
        consume: frees each dense layer as it is packed; `cache` cannot be used afterwards.

    Protected and minimum rows are taken first, the rest by score.

    Raises: ValueError without scores, for NaN scores, unless exactly one of ratio, budget and threshold is given,
        or if more rows are protected than the budget has; torch.OutOfMemoryError that says what for, the cache intact.
    Source: KVzip, arXiv 2505.23416. The authors' code keeps strictly more than a threshold, which loses ties.
    """
    check_kind(cache, DenseCache)
    check_whole(cache)
    if cache.scores is None:
        raise ValueError("expected a cache with scores, got none: call kvzip.score(model, cache) first")
    scores = cache.scores
    if bits not in (None, 8, 4):
        raise ValueError(f"expected bits of 8 or 4, or None for the cache's own dtype, got {bits}")
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
    context = _pack_or_explain(cache, scores, keep, counts, bits=bits, consume=consume)
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
    ratio: float | None = None,
    *,
    level: str = "pair",
    budget: float | None = None,
    threshold: float | None = None,
    protect: Sequence[tuple[int, int]] = (),
    min_rows: int = 0,
    sink: int = 0,
    recent: int = 0,
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
    ratio: float | None,
    *,
    level: str,
    budget: float | None,
    threshold: float | None,
    protect: Sequence[tuple[int, int]],
    min_rows: int,
    sink: int,
    recent: int,
) -> tuple[Bool[Tensor, "L H E"], list[list[int]]]:
    """The mask, and on the host how many of each head it keeps."""
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
    scores: Scores, *, ratio: float | None, budget: float | None, threshold: float | None, level: str
) -> Callable[[int], int] | None:
    """Returns how many to keep of the pairs of n whole heads, as a function of n; None for a threshold.

    Raises: ValueError as `compress` does.
    """
    check_kind(scores, Scores)
    for name, value in (("ratio", ratio), ("budget", budget), ("threshold", threshold)):
        if value is not None:
            check_real_number(value, name)
    if sum(x is not None for x in (ratio, budget, threshold)) != 1:
        raise ValueError(
            f"expected exactly one of ratio, budget and threshold, got ratio={ratio}, budget={budget}, "
            f"threshold={threshold}: pass ratio=0.3 to keep 30%"
        )
    if level not in ("pair", "layer", "uniform", "head"):
        raise ValueError(f"expected level 'pair', 'layer', 'uniform' or 'head', got {level!r}")
    evictable = scores.values.shape[2]
    if ratio is not None:
        if not 0 < ratio <= 1:
            raise ValueError(f"expected 0 < ratio <= 1, the fraction of pairs that is KEPT, got {ratio}: 0.3 keeps 30%")
        if level == "head":
            return lambda heads: int(ratio * heads) * evictable
        return lambda heads: int(ratio * (heads * evictable))
    if budget is not None:
        if not budget > 0:
            raise ValueError(f"expected a budget above 0 tokens per head, got {budget}")
        return lambda heads: int(min(budget * heads, heads * evictable))
    if level != "pair":
        raise ValueError(f"expected level 'pair' with a threshold, got {level!r}: a threshold has no budget to share")
    if threshold != threshold:
        raise ValueError("expected a threshold that is a number, got NaN: scores are compared with it")
    return None


def _ends(scores: Scores, level: str, *, sink: int, recent: int) -> Bool[Tensor, " E"] | None:
    """The tokens that dropped heads keep, as DuoAttention's streaming heads do; None where there are none."""
    if not sink and not recent:
        return None
    if level != "head":
        raise ValueError(
            f"expected level 'head' with sink and recent, got {level!r}: no other level drops whole heads; use protect="
        )
    if min(sink, recent) < 0:
        raise ValueError(f"expected sink and recent of 0 tokens or more, got sink={sink} and recent={recent}")
    token = torch.arange(scores.values.shape[2], device=scores.values.device)
    return (token < sink) | (token >= len(token) - recent)


def _forced(
    scores: Scores, nan: Tensor, *, protect: Sequence[tuple[int, int]], min_rows: int
) -> Bool[Tensor, "L H E"] | None:
    """The pairs kept whatever their score, or None where there are none."""
    evictable = scores.values.shape[2]
    if not protect and not min_rows:
        return None
    if not 0 <= min_rows <= evictable:
        raise ValueError(f"expected 0 <= min_rows <= {evictable} (context tokens), got {min_rows}")
    forced = ops.select_uniform_count(scores.values, count=min_rows, nan=nan)
    for start, stop in protected_spans(protect, evictable):
        forced[:, :, start:stop] = True
    return forced


def protected_spans(protect: Sequence[tuple[int, int]], evictable: int | None) -> list[tuple[int, int]]:
    """Returns the spans of `compress(protect=)`, checked. `evictable`: how many context tokens there are, if known."""
    spans = []
    for span in protect:
        try:
            start, stop = map(operator.index, span)
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


def _pack_or_explain(
    cache: DenseCache,
    scores: Scores,
    keep: Bool[Tensor, "L H E"],
    counts: list[list[int]],
    *,
    bits: int | None,
    consume: bool,
) -> tuple[RaggedKV | WindowKV, ...]:
    """`_pack`, which either succeeds or leaves the cache as it was, with an error that says what was missing."""
    layer = next(layer for layer in cache.layers if isinstance(layer, DenseKV))
    pair = 2 * layer.k.shape[-1] * layer.k.element_size()
    sizes = [pair * (sum(kept) + scores.start * len(kept)) for kept in counts]
    # consuming frees a layer before the next is packed, so that one packed layer at a time is all that is added
    needed = max(sizes) if consume else sum(sizes)
    explanation = f"{needed:,} bytes for the kept pairs" + (" of the largest layer" if consume else "")
    remedy = "keep less (ratio, bits=8 or 4)" + ("" if consume else ", or pass consume=True") + "; the cache is intact"
    free = free_bytes(layer.k.device)
    if consume and free is not None and free < needed:  # before the first layer is gone
        raise torch.OutOfMemoryError(f"expected room for {explanation}, got {free:,} bytes free: {remedy}")
    with explain_out_of_memory(explanation, remedy):
        return _pack(cache, scores, keep, counts, bits=bits, consume=consume)


def _pack(
    cache: DenseCache,
    scores: Scores,
    keep: Bool[Tensor, "L H E"],
    counts: list[list[int]],
    *,
    bits: int | None,
    consume: bool,
) -> tuple[RaggedKV | WindowKV, ...]:
    """Packs the kept pairs of each layer, counts[l][h] of each head, the prefix in front of them."""
    context: list[RaggedKV | WindowKV] = []
    layers = cache.layers if consume else list(cache.layers)
    scored = iter(zip(keep, counts, strict=True))
    while layers:
        layer = layers[0]
        if isinstance(layer, DenseKV):
            mask, kept = next(scored)
            bounds = [0, *itertools.accumulate(scores.start + count for count in kept)]
            prefix = mask.new_ones(mask.shape[0], scores.start)
            k, v, offsets, positions = ops.prune(
                layer.k[0], layer.v[0], torch.cat([prefix, mask], dim=1), total=bounds[-1]
            )
            if bits is not None:
                k, v = ops.quantize(k, bits=bits, offsets=offsets), ops.quantize(v, bits=bits)
            context.append(RaggedKV(k, v, offsets, positions, ops.decode_schedule(offsets, bounds=bounds)))
        else:
            context.append(layer)
        del layers[0], layer  # not before it is packed: what fails for lack of memory loses nothing
    return tuple(context)
