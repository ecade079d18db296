"""What is held between two segments of a long context, and how a segment is taken in: read, scored, chosen, packed."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64
from torch import Tensor

from .. import ops
from ..attention import new_layers, prefill_attend, segment_attend
from ..cache import DenseCache, DenseKV, RaggedCache, RaggedKV, Scores, WindowKV, as_ragged
from ..models import Model, run_attention
from ..ops import DecodeSchedule
from ..options import Scoring
from ..scoring import score_chunks
from .shares import check_share, count_protected

_PASS = 4_000  # tokens of a segment per forward pass, which bounds the memory for activations


@dataclass(frozen=True)
class Unpacked:
    """A layer that has taken in a segment: the rows that it held and the segment's tokens, of which some stay.

    Keys and values are what their rows are still to be gathered from, (held [N D], the segment's [1 H S D] with the
    prefix in front), or one tensor once they are. The rest is of the held rows but for the segment's ranks, and the
    position of its first token.
    """

    k: Tensor | tuple[Tensor, Tensor]
    v: Tensor | tuple[Tensor, Tensor]
    offsets: Int32[Tensor, " H1"]
    positions: Int32[Tensor, " N"]
    schedule: DecodeSchedule
    keep: list[Bool[Tensor, " _"]]  # for each head: its held rows, then the segment's tokens
    ranks: Float32[Tensor, "H E"]
    first: int


@dataclass
class Run:
    """What is held between two segments, and while the latest is packed.

    ranks[i]: the score of each row of layer i, infinite for the prefix's and those protected; None for window layers.
    scores: of all context tokens so far, by segment, on the host.
    spans: the context tokens that stay whatever their score.
    """

    context: list[Any]  # RaggedKV or WindowKV; Unpacked until `_pack_` has been there
    ranks: list[Float32[Tensor, " _"] | None]
    start: int
    chat: bool
    token_ids: Int64[Tensor, " S"]
    kept: int
    scores: tuple[Float32[Tensor, "L H _"], ...]
    spans: list[tuple[int, int]]


def begin(model: Model, prefix: Int64[Tensor, " S"], chat: bool, spans: list[tuple[int, int]]) -> Run:
    """The run before its first segment: the prefix alone."""
    layers = new_layers(model.config, len(prefix), dtype=model.dtype, device=model.device)
    if len(prefix):
        positions = torch.arange(len(prefix), device=model.device)
        with torch.no_grad():
            run_attention(model, prefix[None].to(model.device), positions, prefill_attend(model.config, layers, 0))
    dense = DenseCache(layers, len(prefix), len(prefix), chat, prefix, model.fingerprint)
    return run_of(as_ragged(dense), (), spans)


def run_of(cache: RaggedCache, scores: tuple[Float32[Tensor, "L H _"], ...], spans: list[tuple[int, int]]) -> Run:
    """The run whose state a cache and the scores of its context are."""
    ranks: list[Float32[Tensor, " _"] | None] = []
    layers = iter(range(len(cache.context)))
    for layer in cache.context:
        if not isinstance(layer, RaggedKV):
            ranks.append(None)
            continue
        index = next(layers)
        heads = torch.repeat_interleave(layer.offsets.diff().long())
        rank = torch.full(layer.positions.shape, torch.inf, device=layer.positions.device)
        own = layer.positions >= cache.start
        if scores:
            values = _ranked(scores[0][index].to(rank.device), spans, 0)
            rank[own] = values[heads[own], layer.positions[own].long() - cache.start]
        ranks.append(rank)
    return Run(
        context=list(cache.context),
        ranks=ranks,
        start=cache.start,
        chat=cache.chat,
        token_ids=cache.token_ids,
        kept=cache.kept,
        scores=scores,
        spans=spans,
    )


def extend(
    model: Model,
    run: Run,
    ids: Int64[Tensor, " S"],
    *,
    ratio: float,
    share: str,
    known: int | None,
    end: int,
    scoring: Scoring,
) -> None:
    """Prefills, scores and packs one segment. Interrupted anywhere, the run is what it was or what it is after it."""
    segment = _prefill_segment(model, run, ids)
    older = run.token_ids[run.start :]
    values = score_chunks(model, segment, scoring, past=run.context, before=older, end=end)
    layers, heads, count = values.shape
    pairs = layers * heads * (len(older) + count)
    budget = int(ratio * (pairs if known is None else layers * heads * known))
    protected = layers * heads * count_protected(run.spans, 0, len(older) + count)
    if share == "segment":
        check_share(run.spans, len(older), len(older) + count, budget - run.kept, heads=layers * heads)
    kept = min(max(budget, protected), run.kept + values.numel())
    ranks = _ranked(values, run.spans, len(older))
    chosen = iter(zip(_choose(run, ranks, kept, everything=share == "segment"), ranks, strict=True))
    context = [
        new if isinstance(new, WindowKV) else _unpacked(held, new, *next(chosen), first=len(run.token_ids))
        for held, new in zip(run.context, segment.layers, strict=True)
    ]
    token_ids, scores = torch.cat([run.token_ids, ids]), (*run.scores, values.cpu())
    vars(run).update(context=context, token_ids=token_ids, kept=kept, scores=scores)  # in one step
    del segment, context, values, ranks, chosen
    _pack_(run)


def _unpacked(held: RaggedKV, new: DenseKV, keep: list[Tensor], ranks: Tensor, *, first: int) -> Unpacked:
    assert isinstance(held.k, Tensor) and isinstance(held.v, Tensor)
    parts = ((held.k, new.k), (held.v, new.v))
    return Unpacked(*parts, held.offsets, held.positions, held.schedule, keep, ranks, first)


def _prefill_segment(model: Model, run: Run, ids: Int64[Tensor, " S"]) -> DenseCache:
    """The dense cache of the prefix and of one segment, which attended to all that is held."""
    start, length = run.start, len(run.token_ids)
    layers = new_layers(model.config, start + len(ids), dtype=model.dtype, device=model.device)
    for index, held in enumerate(run.context):
        if isinstance(held, WindowKV):
            layers[index] = held
            continue
        assert isinstance(held.k, Tensor) and isinstance(held.v, Tensor)
        first = held.offsets[:-1, None].long() + torch.arange(start, device=model.device)  # [H A]
        layers[index].k[0, :, :start] = held.k[first]
        layers[index].v[0, :, :start] = held.v[first]
    on_device = ids.to(model.device)
    for done in range(0, len(ids), _PASS):
        part = on_device[done : done + _PASS]
        positions = torch.arange(length + done, length + done + len(part), device=model.device)
        attend = segment_attend(model.config, run.context, layers, start=start, done=done, position=length + done)
        run_attention(model, part[None], positions, attend)
    token_ids = torch.cat([run.token_ids[:start], ids])
    return DenseCache(layers, start + len(ids), start, run.chat, token_ids, model.fingerprint)


def _choose(
    run: Run, fresh: Float32[Tensor, "L H n"], kept: int, *, everything: bool
) -> list[list[Bool[Tensor, " _"]]]:
    """Which held rows and new tokens, of ranks `fresh`, stay: the prefix and `kept` pairs (see `Unpacked.keep`).

    Equal scores stay in the order of layer, head and token. With `everything` all held rows stay.
    """
    nan = torch.zeros(1, dtype=torch.int32, device=fresh.device)
    spans = [list(itertools.pairwise(held.offsets.tolist())) for held in run.context if isinstance(held, RaggedKV)]
    ranks = [rank for rank in run.ranks if rank is not None]
    if everything:
        chosen = ops.select_count(fresh, count=kept - run.kept, nan=nan)
        keep = [
            [x for (a, b), mask in zip(span, masks, strict=True) for x in (mask.new_ones(b - a), mask)]
            for span, masks in zip(spans, chosen, strict=True)
        ]
    else:
        merged = [
            torch.cat([x for (a, b), new in zip(span, news, strict=True) for x in (rank[a:b], new)])[None]
            for span, rank, news in zip(spans, ranks, fresh, strict=True)
        ]
        prefix = fresh.shape[0] * fresh.shape[1] * run.start
        chosen = ops.select_count(merged, count=kept + prefix, nan=nan)
        sizes = [[n for a, b in span for n in (b - a, fresh.shape[2])] for span in spans]
        keep = [list(mask[0].split(size)) for mask, size in zip(chosen, sizes, strict=True)]
    if nan.item():
        raise ValueError("expected scores without NaN, got some: the model overflowed, use bfloat16 or float32")
    return keep


def _pack_(run: Run) -> None:
    """Packs the layers of a run, one after the other in place, and frees what they are gathered from.

    Each step puts a layer where the same layer was in more pieces, so that the run is the same after any of them, and
    whatever fails loses nothing. The memory added meanwhile is that of the keys or the values of one layer. Layers
    differ in what they keep, up to all of it: the longest come last, when most of the segment is gone.
    """
    sizes = [0 if rank is None else len(rank) for rank in run.ranks]
    for index in sorted(range(len(sizes)), key=sizes.__getitem__):
        if isinstance(run.context[index], Unpacked):
            _pack_layer_(run, index)


def _pack_layer_(run: Run, index: int) -> None:
    layer, rank = run.context[index], run.ranks[index]
    assert rank is not None
    rows = [mask.nonzero()[:, 0] + first for mask, first in zip(layer.keep[::2], layer.offsets.tolist(), strict=False)]
    columns = [mask.nonzero()[:, 0] for mask in layer.keep[1::2]]
    lengths = [len(r) + len(c) for r, c in zip(rows, columns, strict=True)]
    ends = list(itertools.accumulate(lengths, initial=0))
    run.context[index] = layer = replace(layer, k=_gather(layer.k, run.start, rows, columns, ends))
    v = _gather(layer.v, run.start, rows, columns, ends)
    positions, ranks = [], []
    for head, (r, c) in enumerate(zip(rows, columns, strict=True)):
        positions += [layer.positions[r], (c + layer.first).int()]
        ranks += [rank[r], layer.ranks[head, c]]
    offsets = torch.tensor(ends, dtype=torch.int32, device=v.device)
    packed = RaggedKV(layer.k, v, offsets, torch.cat(positions), ops.decode_schedule(offsets, bounds=ends))
    run.context[index], run.ranks[index] = packed, torch.cat(ranks)


def _gather(
    parts: tuple[Float[Tensor, "N D"], Float[Tensor, "1 H S D"]],
    start: int,
    rows: list[Tensor],
    columns: list[Tensor],
    ends: list[int],
) -> Float[Tensor, "M D"]:
    """Of each head its rows that stay, then the segment's that stay, which begin at `start` of the second part."""
    old, fresh = parts
    out = old.new_empty(ends[-1], old.shape[1])
    for head, (r, c) in enumerate(zip(rows, columns, strict=True)):
        middle = ends[head] + len(r)
        torch.index_select(old, 0, r, out=out[ends[head] : middle])
        torch.index_select(fresh[0, head, start:], 0, c, out=out[middle : ends[head + 1]])
    return out


def _on_host(layer: Unpacked, start: int) -> RaggedKV:
    """The layer that `_pack_` would make, for a file: a device that has no room for it is not asked for any.

    Its schedule, which files do not hold, is another's.
    """
    masks, bounds = [mask.cpu() for mask in layer.keep], layer.offsets.tolist()
    ends = list(itertools.accumulate(map(int, map(torch.sum, masks)), initial=0))

    def gathered(old: Tensor, fresh: Tensor) -> Tensor:
        out = old.new_empty(ends[-1], *old.shape[1:])
        for head, (first, stop) in enumerate(itertools.pairwise(bounds)):
            a, b, c = ends[2 * head : 2 * head + 3]
            out[a:b] = old[first:stop][masks[2 * head]]
            out[b:c] = fresh[head][masks[2 * head + 1]]
        return out

    k, v = (x if isinstance(x, Tensor) else gathered(x[0].cpu(), x[1].cpu()[0, :, start:]) for x in (layer.k, layer.v))
    heads, tokens = layer.ranks.shape
    fresh = torch.arange(layer.first, layer.first + tokens, dtype=torch.int32).expand(heads, -1)
    offsets = torch.tensor(ends[::2], dtype=torch.int32)
    return RaggedKV(k, v, offsets, gathered(layer.positions.cpu(), fresh), layer.schedule)


def _ranked(values: Float32[Tensor, "*L H n"], spans: list[tuple[int, int]], first: int) -> Float32[Tensor, "*L H n"]:
    """Scores of context tokens from `first` on, below infinity but where they are protected."""
    ranks = values.clamp(max=torch.finfo(torch.float32).max)
    for start, stop in spans:
        ranks[..., max(0, start - first) : max(0, stop - first)] = torch.inf
    return ranks


def cache_of(model: Model, run: Run, source: str, share: str) -> RaggedCache:
    scored = tuple(i for i, layer in enumerate(run.context) if not isinstance(layer, WindowKV))
    length = len(run.token_ids)
    values = torch.empty(len(scored), model.config.num_kv_heads, length - run.start, dtype=torch.float32)
    for out, part in zip(values.split([part.shape[2] for part in run.scores], dim=2), run.scores, strict=True):
        out.copy_(part)
    return RaggedCache(
        context=tuple(_on_host(layer, run.start) if isinstance(layer, Unpacked) else layer for layer in run.context),
        tail=None,
        context_length=length,
        start=run.start,
        chat=run.chat,
        token_ids=run.token_ids,
        fingerprint=model.fingerprint,
        kept=run.kept,
        total=values.numel(),
        scores=Scores(values, scored, run.start, length, source),
        method=f"{source}/stream-{share}",
    )
