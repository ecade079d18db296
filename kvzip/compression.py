"""Compression: scores to a keep mask to a ragged cache, layer by layer."""

from collections.abc import Sequence
from typing import Any, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from . import checks, ops, options
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
from .cache.caches import ragged_of
from .cache.rows import pack, ranked
from .checks import check_kind
from .options import Budget


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
    bits = None if bits is None else checks.whole(bits, "bits")
    if bits not in (None, 8, 4):
        raise ValueError(f"expected bits of 8 or 4, or None for the cache's own dtype, got {bits}: pass one of them")
    chosen = options.budget(
        ratio,
        level=level,
        budget=budget,
        threshold=threshold,
        protect=protect,
        min_rows=min_rows,
        sink=sink,
        recent=recent,
    )
    keep, counts = _keep(cache.scores, chosen)
    context = _pack(cache, cache.scores, keep, counts, bits=bits, consume=consume)
    kept, method = sum(map(sum, counts)), f"{cache.scores.source}/{level}"
    return ragged_of(cache, context, kept=kept, total=keep.numel(), method=method)


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
    check_kind(scores, Scores)
    chosen = options.budget(
        ratio,
        level=level,
        budget=budget,
        threshold=threshold,
        protect=protect,
        min_rows=min_rows,
        sink=sink,
        recent=recent,
    )
    return _keep(scores, chosen)[0]


def count_of(budget: Budget, heads: int, tokens: int) -> int | None:
    """Returns how many to keep of the pairs of so many whole heads of `tokens` each; None for a threshold."""
    if budget.ratio is not None:
        whole = budget.level == "head"
        return int(budget.ratio * heads) * tokens if whole else int(budget.ratio * (heads * tokens))
    return None if budget.budget is None else int(min(budget.budget * heads, heads * tokens))


def _keep(scores: Scores, budget: Budget) -> tuple[Bool[Tensor, "L H E"], list[list[int]]]:
    """The mask, and on the host how many of each head it keeps."""
    nan = torch.zeros(1, dtype=torch.int32, device=scores.values.device)
    forced = _forced(scores, budget, nan)
    if budget.threshold is None:
        keep = _select(scores.values, budget, forced, nan)
    else:
        nan |= scores.values.isnan().any().int()
        keep = scores.values >= budget.threshold
        keep = keep if forced is None else keep | forced
    if budget.sink or budget.recent:  # what dropped heads keep, as DuoAttention's streaming heads do
        token, tokens = torch.arange(keep.shape[2], device=keep.device), keep.shape[2]
        keep = keep | (token < min(budget.sink, tokens)) | (token >= tokens - min(budget.recent, tokens))
    *flat, overflowed = torch.cat([keep.sum(-1).flatten(), nan]).tolist()  # the one wait for the device
    if overflowed:
        raise ValueError(
            "expected scores without NaN, got some: the model overflowed, score again in bfloat16 or float32"
        )
    return keep, [flat[i : i + keep.shape[1]] for i in range(0, len(flat), keep.shape[1])]


def _forced(scores: Scores, budget: Budget, nan: Tensor) -> Bool[Tensor, "L H E"] | None:
    """The pairs kept whatever their score, or None where there are none."""
    evictable = scores.values.shape[2]
    options.check_spans(budget.protect, evictable)
    if not budget.protect and not budget.min_rows:
        return None
    if not 0 <= budget.min_rows <= evictable:
        raise ValueError(
            f"expected 0 <= min_rows <= {evictable} (context tokens), got {budget.min_rows}: no head has more rows to "
            "keep"
        )
    forced = ops.select_uniform_count(scores.values, count=budget.min_rows, nan=nan)
    for first, stop in budget.protect:
        forced[:, :, first:stop] = True
    return forced


def _select(
    values: Float32[Tensor, "L H E"], budget: Budget, forced: Bool[Tensor, "L H E"] | None, nan: Tensor
) -> Bool[Tensor, "L H E"]:
    layers, heads, evictable = values.shape
    if budget.level == "head":
        count = count_of(budget, layers * heads, evictable)
        assert count is not None
        keep = _highest(values.amax(-1, keepdim=True), count // max(1, evictable), nan).expand_as(values)
        return keep if forced is None else keep | forced
    sharing = {"pair": layers * heads, "layer": heads, "uniform": 1}[budget.level]
    count = count_of(budget, sharing, evictable)
    assert count is not None
    if forced is not None:
        needed = int(forced.reshape(-1, sharing * evictable).sum(-1).max())
        if needed > count:
            raise ValueError(
                f"expected at most {count} protected and minimum rows (the budget of level {budget.level!r}), got "
                f"{needed}: raise the ratio or the budget, or protect less"
            )
        values = ranked(values).masked_fill(forced, torch.inf)
    if budget.level == "uniform":
        return ops.select_uniform_count(values, count=count, nan=nan)
    parts = [values] if budget.level == "pair" else list(values.split(1))
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
                whole = torch.nn.functional.pad(keep[at], (scores.start, 0), value=True)
                rows = [scores.start + count for count in counts[at]]
                context[n] = pack(layers[n].k[0], layers[n].v[0], whole, rows, bits=bits)
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
