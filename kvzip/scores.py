"""Scores as an object of their own: attached, combined, applied again, saved and loaded, plotted.

`compress` and `keep_mask` turn them into pairs at any ratio or budget; no forward pass is needed again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

import torch

from . import checks, options
from .cache import DenseCache, RaggedCache, RaggedKV, Scores, check_cache
from .cache.caches import REFITTED
from .cache.rows import of_rows, ranked, take
from .checks import check_kind, check_path, check_values
from .choosing import count_of
from .compression import keep_mask
from .display import visible_line
from .files.damage import refusing, require
from .files.header import open_file
from .files.schema import foreign
from .files.tensors import read_tensor, write_file
from .inputs import digest_of
from .parallel import agreed, everyone, heads_of, select_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def attach(cache: DenseCache, scores: Scores) -> DenseCache:
    """Returns a cache of the same pairs with these scores in place of its own.

    Raises: ValueError if the scores are those of other layers, heads or tokens; TypeError unless they are float32.
    """
    check_kind(cache, DenseCache)
    check_kind(scores, Scores)
    check_values(scores.values, "scores")
    layers, shape, span = _place(cache)
    if (tuple(scores.layers), tuple(scores.values.shape), (scores.start, scores.stop)) != (layers, shape, span):
        raise ValueError(
            f"expected scores {list(shape)} of layers {layers} and tokens {span}, got {list(scores.values.shape)} of "
            f"layers {scores.layers} and tokens {(scores.start, scores.stop)}: attach them to the cache they are of"
        )
    return replace(cache, scores=replace(scores, values=scores.values.to(cache.device)))


def combine(*scores: Scores) -> Scores:
    """Returns the largest of several scores of the same pairs, pair by pair.

    A pair that matters by any of several repeats, chunk sizes or hints still matters. All scores must be on one scale:
    from one method, or rescaled by the caller.

    Raises: ValueError for none, or scores of other layers, heads or tokens; TypeError unless they are float32.
    """
    if not scores:
        raise ValueError("expected scores to combine, got none: pass two or more")
    for one in scores:
        check_kind(one, Scores)
        check_values(one.values, "scores")
    first = scores[0]
    for other in scores[1:]:
        same = (other.layers, other.start, other.stop) == (first.layers, first.start, first.stop)
        if not same or other.values.shape != first.values.shape:
            raise ValueError(
                f"expected scores {list(first.values.shape)} of tokens {first.start} to {first.stop}, got "
                f"{list(other.values.shape)} of {other.start} to {other.stop}: combine scores of one cache"
            )
    values = reduce(torch.maximum, (one.values.to(first.values.device) for one in scores))
    source = f"max({', '.join(dict.fromkeys(one.source for one in scores))})"
    return replace(first, values=values, source=source if len(scores) > 1 else first.source)


def shrink(
    cache: RaggedCache,
    ratio: SupportsFloat | None = None,
    *,
    budget: SupportsFloat | None = None,
    threshold: SupportsFloat | None = None,
    protect: Sequence[tuple[int, int]] = (),
) -> RaggedCache:
    """Returns a compressed cache that keeps fewer of its pairs: the int(ratio * total) highest scored that it holds.

    `shrink(compress(cache, 0.5), 0.2)` is `compress(cache, 0.2)`, without the dense cache or another pass; packed pairs
    keep their bits. The prefix, window layers and the tail stay; what `compress` had protected competes by score,
    unless it is protected again. Rows of a refitted cache keep their biases and values, which stood for all pairs
    together with those that are dropped now: `refit(compress(cache, 0.2))` is better where the dense cache is at hand.

    Args:
        ratio: fraction of ALL evictable pairs that is kept, at most what the cache holds.
        budget: tokens per head on average, in place of a ratio.
        threshold: keeps what the cache holds with score >= threshold, in place of a ratio.
        protect: spans of context tokens, as in `compress`; all their pairs that the cache holds stay.

    Raises: ValueError for a cache without scores, more than it holds, fewer than are protected, and arguments that
        `compress` refuses; TypeError for a dense cache.
    """
    check_kind(cache, RaggedCache)
    scores = cache.scores
    if scores is None:
        raise ValueError("expected a cache with scores, got none: compress a scored cache, or shrink before folding")
    chosen = options.budget(ratio, budget=budget, threshold=threshold, protect=protect)
    layers, heads, evictable = scores.values.shape
    options.check_spans(chosen.protect, evictable)
    scored = [layer for layer in cache.context if isinstance(layer, RaggedKV)]
    own = ranked(heads_of(cache.share, scores.values), chosen.protect)
    ranks = [of_rows(x, values, cache.start) for x, values in zip(scored, own, strict=True)]
    prefix = cache.start * layers * heads

    def held(least: float) -> int:
        """Rows of all heads with such a rank, without the prefix."""
        counts = everyone(cache.share, sum(int((rank >= least).sum()) for rank in ranks))
        return sum(counts if cache.share is None else [counts[rank] for rank in cache.share.speakers]) - prefix

    forced = held(torch.inf)
    count = count_of(chosen, layers * heads, evictable)
    if count is None:
        assert chosen.threshold is not None
        count = held(chosen.threshold)
    if not forced <= count <= cache.kept:
        raise ValueError(
            f"expected to keep {forced} (protected) to {cache.kept} pairs (what the cache holds of {cache.total}), a "
            f"ratio of {forced / cache.total:.4f} to {cache.kept / cache.total:.4f}, got {count}: pairs that are gone "
            "do not come back"
        )
    keep = select_rows(cache.share, ranks, count=count + prefix)
    packed = iter([take(layer, mask) for layer, mask in zip(scored, keep, strict=True)])
    context = tuple(next(packed) if isinstance(layer, RaggedKV) else layer for layer in cache.context)
    fitted = any(isinstance(layer, RaggedKV) and layer.bias is not None for layer in context)
    return replace(cache, context=context, kept=count, method=f"{scores.source}/pair{REFITTED if fitted else ''}")


def save(
    cache: DenseCache | RaggedCache, path: str | Path, *, note: Mapping[str, Any] | None = None, overwrite: bool = False
) -> None:
    """Writes a cache's scores without its pairs, 4 bytes a pair, with digests of its model and tokens.

    Args:
        overwrite: replaces a file that kvzip wrote. Any other file is left as it is, always.

    Raises: ValueError for a cache without scores, or a consumed one; TypeError for a note that JSON cannot hold;
        FileExistsError for a file that is there and must not be replaced; OSError.
    """
    check_cache(cache)
    check_path(path, "path")
    scores = cache.scores
    if scores is None:
        raise ValueError("expected a cache with scores, got none: call kvzip.score(model, cache) first")
    check_values(scores.values, "scores")
    header = {"cache": "Scores", "fingerprint": cache.fingerprint, "tokens": digest_of(cache.token_ids[: scores.stop])}
    header |= {"layers": scores.layers, "start": scores.start, "stop": scores.stop, "source": scores.source}
    agreed(cache.share, lambda: write_file(path, {"values": scores.values}, header, note=note, overwrite=overwrite))


def load(path: str | Path, cache: DenseCache | RaggedCache) -> Scores:
    """Returns the scores of a file that `save` wrote, on the device of the cache that they must belong to.

    Raises: FileNotFoundError; ValueError for a damaged file, one without scores, or those of another model or tokens.
    """
    check_path(path, "path")
    layers, shape, span = _place(cache)
    with open_file(path) as file:
        header, name = file.header, visible_line(file.path.name)
        if header["cache"] != "Scores":
            raise ValueError(
                f"expected a file of scores, got one of {header['cache']!r} in {name}: load_cache reads caches"
            )
        with refusing(file.path):
            place = file.tensors["values"]
            require(place.dtype == "F32", f"values are {place.dtype}")
        reason = foreign(header["fingerprint"], cache.fingerprint)
        if reason:
            raise ValueError(f"expected scores by the cache's model, got {name} by another: {reason}")
        same = (header["layers"], header["start"], header["stop"]) == ([*layers], *span)
        if not same or place.shape != shape or header["tokens"] != digest_of(cache.token_ids[: span[1]]):
            raise ValueError(f"expected scores of this cache's tokens, got those of others in {name}: score it again")
        with refusing(file.path):
            return Scores(read_tensor(file, "values", cache.device), layers, *span, header["source"])


def plot(scores: Scores, ratio: SupportsFloat = 0.3, *, title: str | None = None) -> "Figure":
    """Returns a figure: the fraction that each layer and head keeps at a ratio, and how the scores are distributed.

    Save it with `.savefig(path)`; no window is opened. Needs matplotlib.

    Raises: ValueError as `compress` does; ImportError without matplotlib.
    """
    check_kind(scores, Scores)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "expected matplotlib for a plot, got none: pip install matplotlib (in a checkout pip install -e '.[plot]')"
        ) from error
    ratio = checks.kept_ratio(ratio)
    mask = keep_mask(scores, ratio)
    fractions = mask.float().mean(-1).cpu().numpy()
    lowest = scores.values[mask].min().item() if mask.any() else torch.inf
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    heads, histogram = figure.subplots(1, 2, width_ratios=[1, 1.2])
    image = heads.imshow(fractions, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=heads, label="fraction kept")
    heads.set(title=f"{ratio:g} of all pairs kept", xlabel="KV head", ylabel="layer")
    heads.set_yticks(range(len(scores.layers)), [str(layer) for layer in scores.layers], fontsize=6)
    values = scores.values.flatten().float().cpu()
    logarithmic = bool((values >= 0).all())
    if logarithmic:
        values, lowest = values.clamp(min=1e-12).log10(), max(lowest, 1e-12)
    histogram.hist(values.numpy(), bins=100, color="tab:blue")
    at = torch.tensor(lowest).log10().item() if logarithmic else lowest
    histogram.axvline(at, color="tab:red", label=f"lowest kept: {lowest:.3g}")
    histogram.set(xlabel="log10 of the score" if logarithmic else "score", ylabel="pairs", title=scores.source)
    histogram.legend()
    if title is not None:
        figure.suptitle(title)
    return figure


def _place(cache: DenseCache | RaggedCache) -> tuple[tuple[int, ...], tuple[int, int, int], tuple[int, int]]:
    """The scored layers of a cache, the shape of its scores, and the tokens that they are of."""
    check_cache(cache)
    layers, length = cache.scored_layers, cache.context_length
    return layers, (len(layers), cache.all_heads, length - cache.start), (cache.start, length)
