"""Prefill of contexts larger than memory: a segment at a time against the compressed past, packed before the next."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64
from torch import Tensor

from . import ops, prompts
from .attention import new_layers, prefill_attend, segment_attend
from .cache import (
    DenseCache,
    DenseKV,
    RaggedCache,
    RaggedKV,
    Scores,
    WindowKV,
    as_ragged,
    explain_out_of_memory,
    load_cache,
    read_header,
    save,
)
from .checks import check_kind, check_real_number, check_text_or_ids
from .compression import protected_spans
from .models import Model, run_attention
from .prefilling import check_count, check_length, context_ids, prefix_ids, tokenizer_of
from .scoring import check_choice, score_chunks

Pieces = Iterable[str] | Iterable[Tensor]
"""A context in pieces: all text, or all token ids."""

_PASS = 4_000  # tokens of a segment per forward pass, which bounds the memory for activations
_SHARES = ("segment", "running", "final")


def prefill_compressed(
    model: Model,
    context: str | Int64[Tensor, " S"] | Pieces,
    ratio: float,
    *,
    segment: int = 16_000,
    share: str = "running",
    protect: Sequence[tuple[int, int]] = (),
    length: int | None = None,
    scope: str = "chunk",
    method: str = "kvzip",
    chunk: int = 2_000,
    hint: int = 8,
    system: str | None = None,
    instruction: str | None = None,
    template: bool = True,
    checkpoint: str | Path | None = None,
    save_every: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> RaggedCache:
    """Returns the compressed cache of a context whose full cache is never held.

    Each segment attends to what is kept of those before it, is scored as `score` does, and is packed. Peak memory
    beyond the weights is that of the kept pairs, of one segment's pairs and of one packed layer. The cache keeps
    int(ratio * total) pairs, as `compress` does, and the scores of all, in host memory.

    Args:
        context: text, token ids, or an iterable of pieces of either (an open file, a generator). Pieces of text give
            the ids of the whole text, see `prompts.encode_pieces`.
        ratio: fraction of evictable pairs KEPT, 0 < ratio <= 1.
        segment: context tokens that are held uncompressed at a time.
        share: how segments share what is kept. "segment": each keeps its own int(ratio * pairs), so that none is ever
            dropped later. "running": after each segment the highest scored of all held and new pairs stay,
            int(ratio * pairs so far). "final": as "running" with int(ratio * all pairs) from the start, so that the
            highest scored of the whole context stay and early segments are compressed late; the length must be
            known, which it is not for pieces.
        protect: (start, stop) spans of context tokens, 0 the first after the prefix, that stay in all layers and heads,
            as in `compress`. Until the budget has grown to them they stay beyond it. Of pieces, whose end is unknown, a
            span may reach further than there are tokens.
        length: context tokens to expect where pieces do not tell. A repeat's positions start where the context ends, as
            in `score` (a question will come there); where its end is unknown, or nearer than the segment's, they start
            at the segment's end, which keeps other pairs: a guess is better than none.
        scope, method, chunk, hint: as in `score`; "context" is what is kept of the past and the whole segment.
        system, instruction, template: as in `prefill`.
        checkpoint: a file. If it exists, the run goes on from the state in it, and ends with the same bits as one that
            was never interrupted: give the same arguments, with the context from its beginning. The state is written
            there when an exception (Ctrl-C too) leaves the run, with every segment that was finished. The file is
            removed at the end.
        save_every: writes the checkpoint after every so many segments too.
        progress: called with (context tokens done, context tokens in all or None) after each segment.

    Raises: ValueError for an empty context, one beyond `model.config.max_length`, options out of range, more protected
        pairs than the ratio keeps (of a segment, with share "segment"), a checkpoint of other arguments or another
        context; TypeError for pieces of mixed kinds; torch.OutOfMemoryError that says what for.
    """
    check_kind(model, Model)
    if isinstance(context, (Tensor, bytes)) or not isinstance(context, Iterable):
        check_text_or_ids(context, "context")
    check_real_number(ratio, "ratio")
    for name, value in (("segment", segment), ("chunk", chunk), ("save_every", save_every), ("length", length)):
        check_count(1 if value is None else value, name)
    check_choice(scope, method)
    if not 0 < ratio <= 1:
        raise ValueError(f"expected 0 < ratio <= 1, the fraction of pairs that is KEPT, got {ratio}: 0.3 keeps 30%")
    if share not in _SHARES:
        raise ValueError(f"expected share to be one of {_SHARES}, got {share!r}")
    if all(spec.window is not None for spec in model.config.layers):
        raise ValueError("expected a model with global layers, got sliding windows in all: nothing can be compressed")
    prefix = torch.tensor(
        prefix_ids(model, system=system, instruction=instruction, template=template), dtype=torch.long
    )
    pieces, tokens = _pieces(model, context)
    if tokens is None and share == "final":
        raise ValueError(
            "expected share 'segment' or 'running' for a context in pieces, got 'final': its end is unknown"
        )
    spans = protected_spans(protect, tokens)
    heads = sum(spec.window is None for spec in model.config.layers) * model.config.num_kv_heads
    limits: dict[str, Any] = {"heads": heads, "ratio": ratio, "segment": segment, "share": share}
    if tokens is not None:
        _check_protected(spans, tokens, **limits)
    expected = length if tokens is None else tokens
    if expected is not None:
        needed = len(prefix) + expected + min(expected, chunk)
        check_length(model, needed, f"a prefix of {len(prefix)}, a context of {expected} tokens and a repeat pass")
    scoring: dict[str, Any] = {"scope": scope, "method": method, "chunk": chunk, "hint": hint}
    settings = {
        "ratio": ratio,
        "segment": segment,
        "share": share,
        "protect": [list(span) for span in spans],
        **scoring,
    }
    settings |= {"template": template, "prefix": prefix.tolist(), "expected": expected}
    end, source = len(prefix) + (expected or 0), f"{method}-{scope}"
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        run = _resume(model, path, settings, spans)
    else:
        run = _begin(model, prefix, template, spans)
    known = tokens if share == "final" else None
    saved = len(run.token_ids)

    def write() -> None:
        if path is not None and len(run.token_ids) > saved:
            save(_cache_of(model, run, source, share), path, note=settings)

    with torch.no_grad():
        try:
            for number, ids in enumerate(_segments(pieces, segment, run.token_ids[run.start :]), start=1):
                with explain_out_of_memory(
                    f"the pairs and activations of {len(ids)} tokens beside {run.kept} kept pairs",
                    "lower segment, chunk or ratio" + ("" if path is None else f"; what is done is in {path.name}"),
                ):
                    _extend(model, run, ids, ratio=ratio, share=share, known=known, end=end, scoring=scoring)
                if save_every is not None and number % save_every == 0:
                    write()
                    saved = len(run.token_ids)
                if progress is not None:
                    progress(len(run.token_ids) - run.start, tokens)
        except BaseException:
            _settle(run)
            write()
            raise
    if len(run.token_ids) == run.start:
        raise ValueError("expected a context of at least one token, got an empty one: pass the document's text or ids")
    if tokens is None:
        _check_protected(spans, len(run.token_ids) - run.start, **limits)
    if path is not None:
        path.unlink(missing_ok=True)
    return _cache_of(model, run, source, share)


@dataclass(frozen=True)
class _Merge:
    """A scored segment on its way into the held layers: what stays, and the layers done so far.

    Everything that the run is after it, so that `_settle` may be interrupted anywhere and called again.
    """

    segment: list[DenseKV | WindowKV | None]
    keep: list[list[Bool[Tensor, " _"]]]  # by scored layer, for each head: its held rows, then the segment's tokens
    ranks: Float32[Tensor, "L H E"]  # the segment's scores, infinite where they are protected
    token_ids: Int64[Tensor, " S"]
    kept: int
    scores: tuple[Float32[Tensor, "L H _"], ...]
    halves: "dict[int, _Half]" = field(default_factory=dict)  # by layer
    done: dict[int, tuple[RaggedKV | WindowKV, Float32[Tensor, " _"] | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Half:
    """A layer whose keys are packed, and what packing its values takes."""

    k: Float[Tensor, "M D"]
    v: Float[Tensor, "N D"]
    positions: Int32[Tensor, " N"]
    places: tuple[list[Tensor], list[Tensor], list[int]]


@dataclass
class _Run:
    """What is held between two segments.

    ranks[i]: the score of each row of layer i, infinite for the prefix's and those protected; None for window layers.
    scores: of all context tokens so far, by segment, on the host.
    spans: the context tokens that stay whatever their score.
    """

    context: list[Any]  # RaggedKV or WindowKV; None while a segment is taken in
    ranks: list[Float32[Tensor, " _"] | None]
    start: int
    chat: bool
    token_ids: Int64[Tensor, " S"]
    kept: int
    scores: tuple[Float32[Tensor, "L H _"], ...]
    spans: list[tuple[int, int]]
    merge: _Merge | None = None


def _begin(model: Model, prefix: Int64[Tensor, " S"], chat: bool, spans: list[tuple[int, int]]) -> _Run:
    """The run before its first segment: the prefix alone."""
    layers = new_layers(model.config, len(prefix), dtype=model.dtype, device=model.device)
    if len(prefix):
        positions = torch.arange(len(prefix), device=model.device)
        with torch.no_grad():
            run_attention(model, prefix[None].to(model.device), positions, prefill_attend(model.config, layers, 0))
    dense = DenseCache(layers, len(prefix), len(prefix), chat, prefix, model.fingerprint)
    return _run_of(as_ragged(dense), (), spans)


def _run_of(cache: RaggedCache, scores: tuple[Float32[Tensor, "L H _"], ...], spans: list[tuple[int, int]]) -> _Run:
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
    return _Run(
        context=list(cache.context),
        ranks=ranks,
        start=cache.start,
        chat=cache.chat,
        token_ids=cache.token_ids,
        kept=cache.kept,
        scores=scores,
        spans=spans,
    )


def _resume(model: Model, path: Path, settings: dict[str, Any], spans: list[tuple[int, int]]) -> _Run:
    """The run that a checkpoint holds. Raises ValueError if it was made with other arguments."""
    note = read_header(path)["note"]
    different = [name for name in settings if note.get(name) != settings[name]]
    if different:
        name = different[0]
        raise ValueError(
            f"expected a checkpoint of a run with {name}={settings[name]}, got {note.get(name)} in {path.name}: "
            "give the arguments that it was begun with, or another file"
        )
    cache = load_cache(path, model=model)
    if not isinstance(cache, RaggedCache) or cache.scores is None:
        raise ValueError(f"expected a checkpoint of prefill_compressed, got another cache in {path.name}")
    return _run_of(cache, (cache.scores.values.cpu(),), spans)


def _extend(
    model: Model,
    run: _Run,
    ids: Int64[Tensor, " S"],
    *,
    ratio: float,
    share: str,
    known: int | None,
    end: int,
    scoring: Mapping[str, Any],
) -> None:
    """Prefills, scores and packs one segment."""
    segment = _prefill_segment(model, run, ids)
    older = run.token_ids[run.start :]
    values = score_chunks(model, segment, **scoring, past=run.context, before=older, end=end)
    layers, heads, count = values.shape
    pairs = layers * heads * (len(older) + count)
    budget = int(ratio * (pairs if known is None else layers * heads * known))
    protected = layers * heads * _count_protected(run.spans, 0, len(older) + count)
    if share == "segment":
        _check_share(run.spans, len(older), len(older) + count, budget - run.kept, heads=layers * heads)
    kept = min(max(budget, protected), run.kept + values.numel())
    ranks = _ranked(values, run.spans, len(older))
    run.merge = _Merge(
        segment=list(segment.layers),
        keep=_choose(run, ranks, kept, everything=share == "segment"),
        ranks=ranks,
        token_ids=torch.cat([run.token_ids, ids]),
        kept=kept,
        scores=(*run.scores, values.cpu()),
    )
    del segment
    _settle(run)


def _prefill_segment(model: Model, run: _Run, ids: Int64[Tensor, " S"]) -> DenseCache:
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
        attend = segment_attend(model.config, run.context, layers, sink=start, done=done, position=length + done)
        run_attention(model, part[None], positions, attend)
    token_ids = torch.cat([run.token_ids[:start], ids])
    return DenseCache(layers, start + len(ids), start, run.chat, token_ids, model.fingerprint)


def _choose(
    run: _Run, fresh: Float32[Tensor, "L H n"], kept: int, *, everything: bool
) -> list[list[Bool[Tensor, " _"]]]:
    """Which held rows and new tokens, of ranks `fresh`, stay (see `_Merge.keep`): the prefix and `kept` context pairs.

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


def _settle(run: _Run) -> None:
    """Takes the segment under way into the held layers, and frees what it replaces.

    The memory added meanwhile is that of the keys or the values of one layer. Layers differ in what they keep, up to
    all of it: the longest come last, when most of the segment is gone.
    """
    merge = run.merge
    if merge is None:
        return
    scored = [i for i, rank in enumerate(run.ranks) if rank is not None]
    sizes = [0 if rank is None else len(rank) for rank in run.ranks]
    for index in sorted(set(range(len(sizes))) - set(merge.done), key=sizes.__getitem__):
        new, rank = merge.segment[index], run.ranks[index]
        if rank is None:
            assert isinstance(new, WindowKV)
            merge.done[index] = (new, None)
        else:
            assert isinstance(new, DenseKV)
            n, position = scored.index(index), len(merge.token_ids) - merge.ranks.shape[2]
            if index not in merge.halves:
                held = run.context[index]
                assert isinstance(held, RaggedKV) and isinstance(held.k, Tensor) and isinstance(held.v, Tensor)
                places = _places(held, merge.keep[n])
                k = _gather(held.k, new.k, run.start, *places)
                merge.halves[index] = _Half(k, held.v, held.positions, places)
                del held, k
            run.context[index] = None  # of what was held, only what the half has is left
            half = merge.halves[index]
            v = _gather(half.v, new.v, run.start, *half.places)
            positions, ranks = [], []
            for head, (rows, columns) in enumerate(zip(*half.places[:2], strict=True)):
                positions += [half.positions[rows], (columns + position).int()]
                ranks += [rank[rows], merge.ranks[n][head, columns]]
            ends = half.places[2]
            offsets = torch.tensor(ends, dtype=torch.int32, device=v.device)
            schedule = ops.decode_schedule(offsets, bounds=ends)
            layer = RaggedKV(half.k, v, offsets, torch.cat(positions), schedule)
            merge.done[index] = (layer, torch.cat(ranks))
            del merge.halves[index], half, v, layer
        run.context[index], run.ranks[index] = merge.done[index]
        merge.segment[index] = None
        del new, rank
    run.context = [merge.done[i][0] for i in range(len(sizes))]
    run.ranks = [merge.done[i][1] for i in range(len(sizes))]
    run.token_ids, run.kept, run.scores = merge.token_ids, merge.kept, merge.scores
    run.merge = None


def _places(held: RaggedKV, keep: list[Bool[Tensor, " _"]]) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """For each head its held rows and the segment's tokens that stay, and where the heads then end, from 0."""
    rows = [mask.nonzero()[:, 0] + first for mask, first in zip(keep[::2], held.offsets.tolist(), strict=False)]
    columns = [mask.nonzero()[:, 0] for mask in keep[1::2]]
    lengths = [len(r) + len(c) for r, c in zip(rows, columns, strict=True)]
    return rows, columns, list(itertools.accumulate(lengths, initial=0))


def _gather(
    old: Float[Tensor, "N D"],
    fresh: Float[Tensor, "1 H S D"],
    start: int,
    rows: list[Tensor],
    columns: list[Tensor],
    ends: list[int],
) -> Float[Tensor, "M D"]:
    """Of each head its rows that stay, then the segment's that stay, which begin at `start` of `fresh`."""
    out = old.new_empty(ends[-1], old.shape[1])
    for head, (r, c) in enumerate(zip(rows, columns, strict=True)):
        middle = ends[head] + len(r)
        torch.index_select(old, 0, r, out=out[ends[head] : middle])
        torch.index_select(fresh[0, head, start:], 0, c, out=out[middle : ends[head + 1]])
    return out


def _ranked(values: Float32[Tensor, "*L H n"], spans: list[tuple[int, int]], first: int) -> Float32[Tensor, "*L H n"]:
    """Scores of context tokens from `first` on, below infinity but where they are protected."""
    ranks = values.clamp(max=torch.finfo(torch.float32).max)
    for start, stop in spans:
        ranks[..., max(0, start - first) : max(0, stop - first)] = torch.inf
    return ranks


def _count_protected(spans: list[tuple[int, int]], start: int, stop: int) -> int:
    """How many of the context tokens start:stop are protected."""
    inside = sorted((max(a, start), min(b, stop)) for a, b in spans)
    count, end = 0, start
    for a, b in inside:
        count += max(0, b - max(a, end))
        end = max(end, b)
    return count


def _check_protected(
    spans: list[tuple[int, int]], tokens: int, *, heads: int, ratio: float, segment: int, share: str
) -> None:
    """Raises ValueError if more is protected than stays of a context of so many tokens, in `heads` of all layers."""
    if share == "segment":
        for start in range(0, tokens, segment):
            stop = min(start + segment, tokens)
            _check_share(spans, start, stop, int(ratio * (heads * stop)) - int(ratio * (heads * start)), heads=heads)
    needed, kept = _count_protected(spans, 0, tokens), int(ratio * (heads * tokens)) // heads
    if needed > kept:
        raise ValueError(
            f"expected at most {kept} protected tokens, what ratio {ratio:g} keeps of {tokens}, got {needed}: raise "
            "the ratio or protect less"
        )


def _check_share(spans: list[tuple[int, int]], start: int, stop: int, pairs: int, *, heads: int) -> None:
    needed = _count_protected(spans, start, stop)
    if needed * heads > pairs:
        raise ValueError(
            f"expected at most {pairs // heads} protected tokens among {start} to {stop}, the share of that segment, "
            f"got {needed}: take share='running', raise the ratio or protect less"
        )


def _cache_of(model: Model, run: _Run, source: str, share: str) -> RaggedCache:
    scored = tuple(i for i, layer in enumerate(run.context) if isinstance(layer, RaggedKV))
    run.scores = (torch.cat(run.scores, dim=2),)
    values, length = run.scores[0], len(run.token_ids)
    return RaggedCache(
        context=tuple(run.context),
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


def _pieces(model: Model, context: str | Tensor | Pieces) -> tuple[Iterator[Int64[Tensor, " S"]], int | None]:
    """The ids of a context in pieces, and how many they are if that is known."""
    if isinstance(context, (str, Tensor)):
        ids = context_ids(model, context)
        return iter([ids]), len(ids)
    pieces = iter(context)
    first = next(pieces, "")
    pieces = itertools.chain([first], pieces)
    if isinstance(first, str):
        encoded = prompts.encode_pieces(tokenizer_of(model), _all(pieces, str))
        return (torch.tensor(ids, dtype=torch.long) for ids in encoded), None
    return (context_ids(model, piece) for piece in _all(pieces, Tensor)), None


def _all(pieces: Iterator[Any], kind: type) -> Iterator[Any]:
    for piece in pieces:
        if not isinstance(piece, kind):
            raise TypeError(
                f"expected pieces that are all {kind.__name__}, got {type(piece).__name__}: pass text or tensors of ids"
            )
        yield piece


def _segments(
    pieces: Iterator[Int64[Tensor, " S"]], size: int, done: Int64[Tensor, " S"]
) -> Iterator[Int64[Tensor, " S"]]:
    """Yields segments of `size` tokens, the last of fewer, after those that are done.

    Raises: ValueError if the pieces do not begin with the tokens that are done.
    """
    held: list[Tensor] = []
    count, position = 0, 0
    for piece in pieces:
        old = min(len(piece), len(done) - position)
        if not torch.equal(piece[:old], done[position : position + old]):
            raise ValueError("expected the context that the checkpoint was begun with, got other tokens: use its own")
        position += old
        held.append(piece[old:])
        count += len(piece) - old
        if count and len(done) % size:
            raise ValueError("expected the context to end where the checkpoint does, got more tokens: use its own")
        if count >= size:
            ready = torch.cat(held)
            whole = count // size * size
            yield from ready[:whole].split(size)
            held, count = [ready[whole:]], count - whole
    if position < len(done):
        raise ValueError(
            f"expected at least the {len(done)} context tokens that the checkpoint holds, got {position}: use its own"
        )
    if count:
        yield torch.cat(held)
