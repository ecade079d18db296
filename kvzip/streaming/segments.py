"""The state between two segments of a context, and the steps of a segment: prefill, score, choose rows, pack."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int32, Int64
from torch import Tensor

from .. import ops
from ..attention import new_layers, prefill_attend, segment_attend
from ..cache import DenseCache, RaggedCache, RaggedKV, Scores, WindowKV, as_ragged
from ..cache.caches import REFITTED, map_tensors
from ..cache.rows import LARGEST, biases, first_rows, gather, interleave, of_rows, pack, ranked
from ..models import Model, run_attention
from ..ops.types import owners
from ..parallel import Share, heads_of, select_rows, whole_scores
from ..refitting import fit_rows
from ..scoring import score_chunks
from .plan import Plan, check_share, count_protected

Chosen = list[tuple[Bool[Tensor, " _"], list[int], Float32[Tensor, " _"]]]
"""Of each scored layer: which rows stay, how many each part has (see `Unpacked`), and the ranks of those that stay."""

_PASS = 4_000  # tokens of a segment per forward pass, which bounds the memory for activations


@dataclass(frozen=True)
class Unpacked:
    """A layer after a segment, before packing. Its rows are, head after head, those held before and the segment's.

    k, v: a tuple (held [N D], the segment's [H S D]) until the rows that stay are gathered from it into one tensor.
    keep: which rows stay. sizes[2h] rows of head h were held, sizes[2h + 1] are the segment's.
    positions, bias: the tokens of the rows that stay, and their biases if they were fitted.
    """

    k: Any
    v: Any
    keep: Bool[Tensor, " R"]
    sizes: list[int]
    positions: Int32[Tensor, " M"]
    bias: Float[Tensor, " M"] | None = None


@dataclass(frozen=True)
class Run:
    """The state between two segments.

    context: the layers. After `extend`, those without a window are Unpacked until `pack_` has packed them.
    ranks[i]: the score of each row of layer i, infinite for prefix and protected rows; None for window layers.
    kept: how many pairs are held, without the prefix's and those of window layers.
    scores: of all context tokens so far, by segment, on the host.
    """

    context: list[Any]  # RaggedKV, WindowKV or Unpacked
    ranks: list[Float32[Tensor, " _"] | None]
    token_ids: Int64[Tensor, " S"]
    kept: int
    scores: tuple[Float32[Tensor, "L H _"], ...]


def begin(model: Model, plan: Plan) -> Run:
    """The run before its first segment: only the prefix is held."""
    prefix = torch.tensor(plan.prefix, dtype=torch.long)
    layers = new_layers(model.config, plan.start, dtype=model.dtype, device=model.device)
    if plan.start:
        positions = torch.arange(plan.start, device=model.device)
        with torch.no_grad():
            run_attention(model, prefix[None].to(model.device), positions, prefill_attend(model.config, layers, 0))
    dense = DenseCache(layers, plan.start, plan.start, plan.template, prefix, model.fingerprint, share=model.share)
    return run_of(as_ragged(dense), plan)


def run_of(cache: RaggedCache, plan: Plan) -> Run:
    """The run that continues from a cache."""
    none = torch.empty(len(cache.scored_layers), cache.all_heads, 0)
    values = none if cache.scores is None else cache.scores.values.cpu()
    scored = iter(ranks_of(heads_of(cache.share, values), plan))
    ranks = [
        of_rows(layer, next(scored), plan.start) if isinstance(layer, RaggedKV) else None for layer in cache.context
    ]
    return Run(list(cache.context), ranks, cache.token_ids, cache.kept, (values,))


def ranks_of(values: Float32[Tensor, "L h E"], plan: Plan, *, first: int = 0) -> Float32[Tensor, "L h E"]:
    """Returns the ranks of pairs, see `ranked`, from context token `first` on, with which a segment begins.

    In each segment those that the floor gives to a head come right behind the protected ones.
    """
    ranks = ranked(values, plan.protect, first=first)
    parts = zip(values.split(plan.segment, dim=2), ranks.split(plan.segment, dim=2), strict=True)
    for own, rank in parts if plan.floor and values.numel() else ():
        count = int(plan.floor * plan.ratio * own.shape[2])
        mask = ops.select_uniform_count(own, count=count, nan=torch.zeros(1, dtype=torch.int32, device=own.device))
        rank.masked_fill_(mask & rank.isfinite(), LARGEST)
    return ranks


def extend(model: Model, run: Run, ids: Int64[Tensor, " S"], plan: Plan) -> Run:
    """Returns the run after one more segment, with the rows that stay chosen but not packed (see `pack_`)."""
    done = len(run.token_ids) - plan.start
    stop = done + len(ids)
    segment = _prefill(model, run, ids, plan)
    older, end = run.token_ids[plan.start :], plan.start + (plan.expected or 0)
    own = score_chunks(model, segment, plan.scoring, past=run.context, before=older, end=end)
    values = whole_scores(model.share, own)
    heads = values.shape[0] * values.shape[1]
    if plan.share == "segment":
        check_share(plan, heads, done, stop)
    protected = heads * count_protected(plan, 0, stop)
    kept = min(max(plan.budget(heads, stop), protected), run.kept + values.numel())
    context: list[Any] = list(segment.layers)
    ranks = list(run.ranks)
    fresh = ranks_of(heads_of(model.share, values), plan, first=done)
    chosen = _choose(run, fresh, kept + heads * plan.start, plan, model.share)
    positions = torch.arange(plan.start + done, plan.start + stop, dtype=torch.int32, device=values.device)
    fitted = _refit_(model, segment, chosen, plan, before=older, end=end) if plan.refitting is not None else {}
    for n, (keep, sizes, rank) in zip(segment.scored_layers, chosen, strict=True):
        held, new = run.context[n], context[n]
        rows = torch.cat(interleave(held.positions, [positions] * held.heads, sizes))[keep]
        k, v = (held.k, new.k[0, :, plan.start :]), (held.v, new.v[0, :, plan.start :])
        bias = fitted.get(n)
        if bias is not None:
            bias = torch.cat(interleave(biases(held), bias, sizes))[keep]
        context[n], ranks[n] = Unpacked(k, v, keep, sizes, rows, bias), rank
    return Run(context, ranks, torch.cat([run.token_ids, ids]), kept, (*run.scores, values.cpu()))


def _refit_(
    model: Model, segment: DenseCache, chosen: Chosen, plan: Plan, *, before: Int64[Tensor, " S"], end: int
) -> dict[int, Float[Tensor, "H n"]]:
    """Writes fitted values over those of a segment's rows that stay; returns the bias of each token, by layer."""
    assert plan.refitting is not None
    layers: list[Any] = list(segment.layers)
    for n, (keep, sizes, _) in zip(segment.scored_layers, chosen, strict=True):
        own = F.pad(torch.stack(keep.split(sizes)[1::2]), (plan.start, 0), value=True)
        layers[n] = pack(segment.layers[n].k[0], segment.layers[n].v[0], own, own.sum(1).tolist())
    rows, _ = fit_rows(model, segment, layers, plan.refitting, before=before, end=end)
    found = {}
    for n in segment.scored_layers:
        layer, fitted, v = layers[n], rows[n], segment.layers[n].v[0]
        assert fitted is not None
        places = owners(layer.offsets, len(layer.positions)), layer.positions.long()
        v[places] = fitted.values
        bias = fitted.bias.new_zeros(v.shape[:2])
        bias[places] = fitted.bias
        found[n] = bias[:, plan.start :]
    return found


def _prefill(model: Model, run: Run, ids: Int64[Tensor, " S"], plan: Plan) -> DenseCache:
    """The dense cache of the prefix and of one segment, which attended to all that is held."""
    start, length = plan.start, len(run.token_ids)
    layers = new_layers(model.config, start + len(ids), dtype=model.dtype, device=model.device)
    for n, held in enumerate(run.context):
        if isinstance(held, WindowKV):
            layers[n] = held
        else:
            rows = first_rows(held, start)
            layers[n].k[0, :, :start], layers[n].v[0, :, :start] = held.k[rows], held.v[rows]
    on_device = ids.to(model.device)
    for done in range(0, len(ids), _PASS):
        part = on_device[done : done + _PASS]
        positions = torch.arange(length + done, length + done + len(part), device=model.device)
        attend = segment_attend(model.config, run.context, layers, start=start, done=done, position=length + done)
        run_attention(model, part[None], positions, attend)
    token_ids = torch.cat([run.token_ids[:start], ids])
    length = start + len(ids)
    return DenseCache(layers, length, start, plan.template, token_ids, model.fingerprint, share=model.share)


def _choose(run: Run, fresh: Float32[Tensor, "L h n"], count: int, plan: Plan, share: Share | None) -> Chosen:
    """Which `count` rows stay, prefix included, of those held and of new tokens with ranks `fresh`.

    Of each scored layer: `keep` and `sizes` (see `Unpacked`), and the ranks of the rows that stay. Equal ranks stay in
    the order of layer, head and token. With share "segment" all held rows stay.
    """
    merged, parts = [], []
    held = [(layer, rank) for layer, rank in zip(run.context, run.ranks, strict=True) if rank is not None]
    for (layer, rank), new in zip(held, fresh, strict=True):
        old = torch.full_like(rank, torch.inf) if plan.share == "segment" else rank
        parts.append([n for rows in layer.offsets.diff().tolist() for n in (rows, fresh.shape[2])])
        merged.append(torch.cat(interleave(old, new, parts[-1])))
    nan = torch.zeros(1, dtype=torch.int32, device=fresh.device)
    keep = select_rows(share, merged, count=count, nan=nan)
    if nan.item():
        raise ValueError("expected scores without NaN, got some: the model overflowed, use bfloat16 or float32")
    return [(mask, sizes, merged.pop(0)[mask]) for mask, sizes in zip(keep, parts, strict=True)]  # pop frees memory


def pack_(run: Run) -> None:
    """Packs the layers of a run in place, one after the other, and frees what they are gathered from.

    Every step only changes how a layer is stored, so that no error and no interruption loses anything. The memory added
    meanwhile is that of the keys or the values of one layer. The layers that keep most come last, when most of the
    segment is freed.
    """
    sizes = [0 if rank is None else len(rank) for rank in run.ranks]
    for n in sorted(range(len(sizes)), key=sizes.__getitem__):
        if isinstance(run.context[n], Unpacked):
            for layer in _steps(run.context[n]):
                run.context[n] = layer


def _steps(layer: Unpacked) -> Iterator[Unpacked | RaggedKV]:
    """Yields the layer with its keys gathered, then with its values gathered, then packed.

    The caller drops each for the next, which frees the tensors it was gathered from.
    """
    rows = [mask.nonzero()[:, 0] for mask in layer.keep.split(layer.sizes)]
    if isinstance(layer.k, tuple):
        layer = replace(layer, k=gather(layer.k, rows, layer.sizes))
        yield layer
    if isinstance(layer.v, tuple):
        layer = replace(layer, v=gather(layer.v, rows, layer.sizes))
        yield layer
    counts = [len(old) + len(new) for old, new in zip(rows[::2], rows[1::2], strict=True)]
    bounds = [0, *itertools.accumulate(counts)]
    offsets = layer.positions.new_tensor(bounds)
    schedule = ops.decode_schedule(offsets, bounds=bounds)
    yield RaggedKV(layer.k, layer.v, offsets, layer.positions, schedule, layer.bias)


def cache_of(model: Model, run: Run, plan: Plan) -> RaggedCache:
    """The cache of the segments so far.

    Layers that an interruption left unpacked are packed on the host, where saving needs them: the device may be full.
    """
    context, source = list(run.context), plan.scoring.source
    for n, layer in enumerate(context):
        if isinstance(layer, Unpacked):
            *_, context[n] = _steps(map_tensors(layer, Tensor.cpu))
    scored = tuple(n for n, rank in enumerate(run.ranks) if rank is not None)
    values, length = torch.cat(run.scores, dim=2), len(run.token_ids)
    return RaggedCache(
        context=tuple(context),
        tail=None,
        context_length=length,
        start=plan.start,
        chat=plan.template,
        token_ids=run.token_ids,
        fingerprint=model.fingerprint,
        kept=run.kept,
        total=values.numel(),
        scores=Scores(values, scored, plan.start, length, source),
        method=f"{source}/stream-{plan.share}{REFITTED if plan.refitting is not None else ''}",
        share=model.share,
    )
