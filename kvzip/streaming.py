"""Prefill of contexts larger than memory: a segment at a time against the compressed past, packed before the next."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
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

    Raises: ValueError for an empty context, one beyond `model.config.max_length`, options out of range, a checkpoint
        of other arguments or another context; TypeError for pieces of mixed kinds; torch.OutOfMemoryError that says
        what for.
    """
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
    expected = length if tokens is None else tokens
    if expected is not None:
        needed = len(prefix) + expected + min(expected, chunk)
        check_length(model, needed, f"a prefix of {len(prefix)}, a context of {expected} tokens and a repeat pass")
    scoring: dict[str, Any] = {"scope": scope, "method": method, "chunk": chunk, "hint": hint}
    settings = {"ratio": ratio, "segment": segment, "share": share, **scoring}
    settings |= {"template": template, "prefix": prefix.tolist(), "expected": expected}
    end, source = len(prefix) + (expected or 0), f"{method}-{scope}"
    path = None if checkpoint is None else Path(checkpoint)
    run = _resume(model, path, settings) if path is not None and path.exists() else _begin(model, prefix, template)
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
    values: Float32[Tensor, "L H E"]
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

    ranks[i]: the score of each row of layer i, infinite for the prefix's; None for window layers.
    scores: of all context tokens so far, by segment, on the host.
    """

    context: list[Any]  # RaggedKV or WindowKV; None while a segment is taken in
    ranks: list[Float32[Tensor, " _"] | None]
    start: int
    chat: bool
    token_ids: Int64[Tensor, " S"]
    kept: int
    scores: tuple[Float32[Tensor, "L H _"], ...]
    merge: _Merge | None = None


def _begin(model: Model, prefix: Int64[Tensor, " S"], chat: bool) -> _Run:
    """The run before its first segment: the prefix alone."""
    layers = new_layers(model.config, len(prefix), dtype=model.dtype, device=model.device)
    if len(prefix):
        positions = torch.arange(len(prefix), device=model.device)
        with torch.no_grad():
            run_attention(model, prefix[None].to(model.device), positions, prefill_attend(model.config, layers, 0))
    dense = DenseCache(layers, len(prefix), len(prefix), chat, prefix, model.fingerprint)
    return _run_of(as_ragged(dense), ())


def _run_of(cache: RaggedCache, scores: tuple[Float32[Tensor, "L H _"], ...]) -> _Run:
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
            values = scores[0][index].to(rank.device)
            rank[own] = _finite(values[heads[own], layer.positions[own].long() - cache.start])
        ranks.append(rank)
    return _Run(
        context=list(cache.context),
        ranks=ranks,
        start=cache.start,
        chat=cache.chat,
        token_ids=cache.token_ids,
        kept=cache.kept,
        scores=scores,
    )


def _resume(model: Model, path: Path, settings: dict[str, Any]) -> _Run:
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
    return _run_of(cache, (cache.scores.values.cpu(),))


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
    kept = min(budget, run.kept + values.numel())
    run.merge = _Merge(
        segment=list(segment.layers),
        keep=_choose(run, values, kept, everything=share == "segment"),
        values=values,
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
    run: _Run, values: Float32[Tensor, "L H n"], kept: int, *, everything: bool
) -> list[list[Bool[Tensor, " _"]]]:
    """Which held rows and new tokens stay (see `_Merge.keep`): those of the prefix and `kept` context pairs.

    Equal scores stay in the order of layer, head and token. With `everything` all held rows stay.
    """
    nan = torch.zeros(1, dtype=torch.int32, device=values.device)
    fresh = _finite(values)
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
        prefix = values.shape[0] * values.shape[1] * run.start
        chosen = ops.select_count(merged, count=kept + prefix, nan=nan)
        sizes = [[n for a, b in span for n in (b - a, values.shape[2])] for span in spans]
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
            n, position = scored.index(index), len(merge.token_ids) - merge.values.shape[2]
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
                ranks += [rank[rows], _finite(merge.values[n][head, columns])]
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


def _finite(values: Tensor) -> Tensor:
    """Scores below infinity, which only the prefix has."""
    return values.clamp(max=torch.finfo(torch.float32).max)


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
                f"expected pieces that are all {kind.__name__}, got {type(piece).__name__}: text or tensors"
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
