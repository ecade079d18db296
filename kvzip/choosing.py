"""Which pairs stay: scores and a budget, of pairs or of bytes, to a mask."""

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from . import ops, options
from .cache import DenseCache, Scores, check_whole
from .cache.rows import pack, ranked
from .cache.sizes import ragged_nbytes
from .ops import Quantized
from .options import Budget


def count_of(budget: Budget, heads: int, tokens: int) -> int | None:
    """Returns how many pairs to keep of `heads` heads of `tokens` pairs each; None for a threshold."""
    if budget.ratio is not None:
        whole = budget.level == "head"
        return int(budget.ratio * heads) * tokens if whole else int(budget.ratio * (heads * tokens))
    return None if budget.budget is None else int(min(budget.budget * heads, heads * tokens))


Kept = tuple[Bool[Tensor, "L H E"], list[list[int]]]
"""A mask of pairs, and on the host how many of each head it keeps."""


def keep_bytes(cache: DenseCache, budget: Budget, *, bits: tuple[int, int] | None = None) -> Kept:
    """Returns the most pairs with which a cache has at most `budget.budget_bytes` bytes.

    Scales take two bytes or four, which is known when rows are packed: where they are float32 after all, layers are
    packed once more with fewer rows.

    Raises: ValueError if the cache was consumed or is a share of one, or even the fewest pairs do not fit.
    """
    check_whole(cache)
    if cache.share is not None:
        raise ValueError(
            "expected a whole cache with budget_bytes, got a share of one: each process has other heads, so pass a "
            "ratio or a budget of tokens"
        )
    assert budget.budget_bytes is not None
    wide = cache.layers[0].k.dtype == torch.float32
    turned = (False, False) if bits is None else (bits[0] < 8, bits[1] < 4)  # as `rows.pack` does
    scales = [(4 if wide and not turned[0] else 2, 4 if wide and not turned[1] else 2)] * len(cache.scored_layers)
    while True:
        count, kept = _largest(cache, budget, bits, scales)
        if bits is None or set(scales) == {(4, 4)}:
            return kept
        found = _scales(cache, *kept, bits)
        wider = [(max(a, b), max(x, y)) for (a, x), (b, y) in zip(found, scales, strict=True)]
        if wider == scales:
            break
        scales = wider
    if found == scales:
        return kept
    # Rows that need wide scales are no longer among the kept ones: more fit, until there are such rows again.
    high = _largest(cache, budget, bits, found)[0] + 1
    while high - count > 1:
        middle = (count + high) // 2
        more = _kept(cache, budget, middle)
        if _nbytes(cache, budget, more, bits, _scales(cache, *more, bits)) <= budget.budget_bytes:
            count, kept = middle, more
        else:
            high = middle
    return kept


def _kept(cache: DenseCache, budget: Budget, count: int) -> Kept:
    """What `count` pairs (heads, at level "head") of each shared budget keep, or a few more that are kept anyway."""
    assert cache.scores is not None
    each = cache.scores.values.shape[2] if budget.level == "head" else 1
    return keep_pairs(cache.scores, budget, count=_enough(cache.scores, budget, count) * each)


def _nbytes(
    cache: DenseCache, budget: Budget, kept: Kept, bits: tuple[int, int] | None, scales: list[tuple[int, int]]
) -> int:
    assert cache.scores is not None
    rows = [[cache.scores.start + n for n in own] for own in kept[1]]
    return ragged_nbytes(cache, rows, bits=bits, scales=scales, biases=budget.biases)


def _largest(
    cache: DenseCache, budget: Budget, bits: tuple[int, int] | None, scales: list[tuple[int, int]]
) -> tuple[int, Kept]:
    """The most pairs that fit if scales have so many bytes, and how many of each shared budget they are.

    The search ends between a number that fits and the next one, which does not: bytes only nearly grow in proportion,
    as schedules do not.
    """
    scores, limit = cache.scores, budget.budget_bytes
    assert scores is not None
    assert limit is not None
    layers, heads, evictable = scores.values.shape
    shared = {"layer": heads * evictable, "uniform": evictable, "head": layers * heads}

    def made(count: int) -> tuple[Kept, int]:
        kept = _kept(cache, budget, count)
        return kept, _nbytes(cache, budget, kept, bits, scales)

    high = shared.get(budget.level, layers * heads * evictable)
    found, above = made(high)
    if above <= limit:
        return high, found
    low = _enough(scores, budget, 0)
    found, below = made(low)
    if below > limit:
        raise ValueError(
            f"expected a budget of at least {below:,} bytes, got {limit:,}: that is what prefix, window layers, token "
            "ids, protected rows with the floor beside them, and metadata take; raise budget_bytes or protect less"
        )
    tries = 0
    while high - low > 1:
        part = (limit - below) / (above - below) if tries < 8 else 0.5
        middle = min(high - 1, max(low + 1, low + int(part * (high - low))))
        (new, needed), tries = made(middle), tries + 1
        if needed <= limit:
            low, below, found = middle, needed, new
        else:
            high, above = middle, needed
    return low, found


def _enough(scores: Scores, budget: Budget, count: int) -> int:
    """`count` pairs of a shared budget, or as many more as hold what is kept whatever its score: a floor grows too."""
    layers, heads, evictable = scores.values.shape
    most = _sharing(budget, layers, heads) * evictable
    nan = torch.zeros(1, dtype=torch.int32, device=scores.values.device)

    def suffices(count: int) -> bool:
        forced = _forced(scores, budget, nan, count)
        return forced is None or int(forced.reshape(-1, most).sum(-1).max()) <= count

    if budget.level == "head" or suffices(count):
        return count
    low, high = count, most  # all pairs always do
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


def _scales(
    cache: DenseCache, keep: Bool[Tensor, "L H E"], counts: list[list[int]], bits: tuple[int, int]
) -> list[tuple[int, int]]:
    """The bytes of a scale of keys, and of values, in each layer. It packs them, one layer after the other."""
    found = []
    for mask, own, n in zip(keep, counts, cache.scored_layers, strict=True):
        whole = torch.nn.functional.pad(mask, (cache.start, 0), value=True)
        layer = pack(cache.layers[n].k[0], cache.layers[n].v[0], whole, [cache.start + x for x in own], bits=bits)
        assert isinstance(layer.k, Quantized)
        assert isinstance(layer.v, Quantized)
        found.append((layer.k.scale.element_size(), layer.v.scale.element_size()))
    return found


def _sharing(budget: Budget, layers: int, heads: int) -> int:
    """How many heads share one budget."""
    return {"layer": heads, "uniform": 1}.get(budget.level, layers * heads)


def keep_pairs(scores: Scores, budget: Budget, *, count: int | None = None) -> Kept:
    """Returns what a budget keeps. `count`: so many pairs share each budget, in place of those that it says."""
    nan = torch.zeros(1, dtype=torch.int32, device=scores.values.device)
    forced = _forced(scores, budget, nan, count)
    if budget.threshold is None:
        keep = _select(scores.values, budget, forced, nan, count)
    else:
        nan |= scores.values.isnan().any().int()
        keep = scores.values >= budget.threshold
        keep = keep if forced is None else keep | forced
    if budget.sink or budget.recent:
        token, tokens = torch.arange(keep.shape[2], device=keep.device), keep.shape[2]
        keep = keep | (token < min(budget.sink, tokens)) | (token >= tokens - min(budget.recent, tokens))
    *counts, overflowed = torch.cat([keep.sum(-1).flatten(), nan]).tolist()  # one copy, as each waits for the device
    if overflowed:
        raise ValueError(
            "expected scores without NaN, got some: the model overflowed, score again in bfloat16 or float32"
        )
    return keep, [counts[i : i + keep.shape[1]] for i in range(0, len(counts), keep.shape[1])]


def _forced(scores: Scores, budget: Budget, nan: Tensor, count: int | None) -> Bool[Tensor, "L H E"] | None:
    """The pairs kept whatever their score, or None where there are none. `count`: as in `keep_pairs`."""
    layers, heads, evictable = scores.values.shape
    options.check_spans(budget.protect, evictable)
    if not 0 <= budget.min_rows <= evictable:
        raise ValueError(
            f"expected 0 <= min_rows <= {evictable} (context tokens), got {budget.min_rows}: no head has more rows to "
            "keep"
        )
    every = layers * heads
    total = count_of(budget, every, evictable) if count is None else count * (every // _sharing(budget, layers, heads))
    rows = max(budget.min_rows, int(budget.floor * (total or 0) / every))
    if not budget.protect and not rows:
        return None
    forced = ops.select_uniform_count(scores.values, count=rows, nan=nan)
    for first, stop in budget.protect:
        forced[:, :, first:stop] = True
    return forced


def _select(
    values: Float32[Tensor, "L H E"],
    budget: Budget,
    forced: Bool[Tensor, "L H E"] | None,
    nan: Tensor,
    count: int | None,
) -> Bool[Tensor, "L H E"]:
    layers, heads, evictable = values.shape
    sharing = _sharing(budget, layers, heads)
    count = count_of(budget, sharing, evictable) if count is None else count
    assert count is not None
    if budget.level == "head":
        whole = ops.select_uniform_count(values.amax(-1).view(1, 1, -1), count=count // max(1, evictable), nan=nan)
        keep = whole.view(layers, heads, 1).expand_as(values)
        return keep if forced is None else keep | forced
    if forced is not None:
        needed = int(forced.reshape(-1, sharing * evictable).sum(-1).max())
        if needed > count:
            raise ValueError(
                f"expected at most {count} protected and minimum rows (the budget of level {budget.level!r}), got "
                f"{needed}: raise the ratio or the budget, or protect less"
            )
        values = ranked(values).masked_fill(forced, torch.inf)
    pools = values.reshape(layers * heads // sharing, 1, sharing * evictable)  # one row for each shared budget
    return ops.select_uniform_count(pools, count=count, nan=nan).view(values.shape)
