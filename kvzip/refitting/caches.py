"""`refit`: the public door."""

from dataclasses import replace
from typing import Any, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from .. import ops, options
from ..cache import DenseCache, RaggedCache, RaggedKV, WindowKV, check_pairs, explain_out_of_memory
from ..cache.caches import REFITTED
from ..checks import check_kind
from ..inputs import check_belongs
from ..models import Model
from ..ops.types import owners
from ..options import Refitting
from ..prefilling import Progress
from .fitting import HELD, Mass, Rows, fit_rows


def refit(
    model: Model,
    cache: DenseCache,
    small: RaggedCache,
    *,
    values: bool = True,
    bound: SupportsFloat = 3.0,
    ridge: SupportsFloat = 1e-3,
    pull: SupportsFloat = 1e-1,
    chunk: SupportsIndex = 2_000,
    hint: SupportsIndex = 8,
    progress: Progress | None = None,
) -> RaggedCache:
    """Returns the pairs of `small` with a bias for each row and new values, so that together they get the attention,
    and give the output, that all pairs of the dense cache do.

    The context is repeated a chunk at a time as by `kvzip.score` with scope "chunk". In each layer, head and chunk,
    with query rows i of the repeat, j over the head's kept pairs of the chunk and c over all pairs of the chunk:

        p[i, .] = softmax over [prefix, chunk, repeat up to i] of the logits, at these keys
        m[i] = sum_c p[i, c]    o[i] = the whole output    u = mean_i o[i]    s = mean_i |o[i] - u|^2

    weights w and values C are chosen in turn,

        w = argmin |sum_j p[i, j] w[j] - m[i]|^2 + ridge * mean_j(g[j, j]) * |w - 1|^2    e^-bound <= w[j] <= e^bound
        C = argmin |sum_j p[i, j] w[j] (C[j] - u) - sum_c p[i, c] (v[c] - u)|^2 + pull * a * |C - v|^2

    sums of squares over i too, with g = p'p, a = |WgW|_F^2 / tr(WgW) and W = diag(w), each by a fixed number of steps
    that begin at w = 1 and C = v. The bias of a row is log w[j]. Both pulls are towards what `compress` left: a row
    that no query attends to keeps bias 0 and its value. Of (w, C), (w, v) and (1, v) the one with the lowest

        F(w, C) = s * sum_i (sum_j p[i, j] w[j] - m[i])^2
                  + sum_i |sum_j p[i, j] w[j] (C[j] - u) - sum_c p[i, c] (v[c] - u)|^2

    is stored, so F is never above F(1, v). To first order, and with s for each |o[i] - u|^2, 2 F bounds the squared
    error that eviction makes in the layer's output, a ratio of sums over all chunks. The prefix and window layers stay
    as they are, and so do the rows of a chunk of which a head keeps all pairs, also in bits. At ratio 1 nothing is
    fitted, and `small` itself is returned.

    Args:
        cache: the dense cache that `small` was compressed from; scores are not needed.
        small: quantized keys stay as they are and are what is fitted for; new values get the same bits. Its own biases
            and values are not read: fitting twice is fitting once.
        values: False fits the biases alone.
        bound, ridge, pull: see above; a larger ridge or pull changes less.
        chunk, hint: as in `kvzip.score`.
        progress: called with (context tokens done, context tokens in all).

    Both caches stay as they are; the result shares the keys of `small`. Biases are float16. A refitted cache answers
    questions by `generate`, `ask` and all else as any other; it cannot go to Transformers, which has no bias.
    `kvzip.scores.shrink` drops rows of it and leaves bias and value of the others, which then stand for less than all
    pairs: compress and refit again where the dense cache is at hand. `fold` adds rows of bias 0.

    Raises: ValueError for caches of another model, of other tokens or with turns after the context, a consumed dense
        cache, a `small` that is not of this dense cache, or numbers out of range; torch.OutOfMemoryError.
    Source: Attention Matching, arXiv 2602.16284. There heads have equal or tabled budgets, queries come from the whole
    context at once, and the fits are not bounded by the old values. Here rows are any that `compress` keeps, the fit is
    per chunk, hence linear in the context, errors are about the mean output, and what does not help is not stored.
    """
    chosen = options.refitting(values, bound, ridge, pull, chunk, hint)
    return refit_and_measure(model, cache, small, chosen, progress=progress)[0]


def refit_and_measure(
    model: Model, cache: DenseCache, small: RaggedCache, options: Refitting, *, progress: Progress | None = None
) -> tuple[RaggedCache, Mass]:
    """Returns what `refit` does, and the mass that each head keeps before and after."""
    check_refit(model, cache, small)
    if small.kept == small.total:
        whole = torch.ones(len(cache.scored_layers), cache.all_heads)
        return small, Mass(whole, whole)
    needed = f"the new values of {small.kept:,} pairs, and {HELD:,} bytes to fit them"
    with torch.no_grad(), explain_out_of_memory(needed, "lower chunk; both caches are as they were"):
        rows, mass = fit_rows(model, cache, small.context, options, progress=progress)
        context = tuple(_with(layer, own) for layer, own in zip(small.context, rows, strict=True))
    return replace(small, context=context, method=small.method.removesuffix(REFITTED) + REFITTED), mass


def check_refit(model: Model, cache: DenseCache, small: RaggedCache) -> None:
    """Raises as `refit` does for its model and caches."""
    check_kind(model, Model)
    check_kind(cache, DenseCache)
    check_kind(small, RaggedCache)
    check_pairs(cache)
    check_pairs(small)
    for each in (cache, small):
        check_belongs(model, each)
    if model.share is not None and model.share.repeats > 1:
        raise ValueError(
            f"expected ranks with KV heads of their own to refit, got {model.share.size} ranks for {model.share.heads} "
            f"KV heads: use at most {model.share.heads}"
        )
    if not cache.scored_layers:
        raise ValueError("expected a model with global layers, got sliding windows in all: nothing was dropped")
    if small.tail is not None:
        raise ValueError("expected a cache without turns after its context, got some: refit first, then ask or extend")
    same = (small.start, small.context_length) == (cache.start, cache.length)
    if not same or not torch.equal(small.token_ids, cache.token_ids):
        raise ValueError(
            f"expected a cache that was compressed from this dense one of {cache.length} tokens, got one of "
            f"{small.context_length} with other tokens or another prefix: pass the cache that was compressed"
        )
    for n, (kept, own) in enumerate(zip(small.context, cache.layers, strict=True)):
        if not isinstance(kept, RaggedKV) or not isinstance(kept.k, Tensor):
            continue
        keys = own.k[0][owners(kept.offsets, len(kept.positions)), kept.positions.long()]
        if not torch.equal(keys, kept.k):
            raise ValueError(
                f"expected the keys of this dense cache, got others in layer {n}: a streamed cache is fitted as it is "
                "made, by prefill_compressed(refit=True)"
            )


def _with(layer: RaggedKV | WindowKV, rows: Rows | None) -> RaggedKV | WindowKV:
    if rows is None or isinstance(layer, WindowKV):
        return layer
    v: Any = rows.values
    if not isinstance(layer.v, Tensor):
        v = ops.quantize_like(rows.values, layer.v)
    return replace(layer, v=v, bias=rows.bias)
