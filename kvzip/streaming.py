"""Prefill of contexts larger than memory: a segment at a time against the compressed past, packed before the next."""

import itertools
import json
import logging
import os
import reprlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex

import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64
from torch import Tensor

from . import checks, ops, prompts
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
    read_header,
    save,
)
from .cache.files import open_file
from .cache.io import check_content, check_header, read_cache
from .checks import check_kind, check_path, check_text_or_ids
from .compression import protected_spans
from .models import Model, run_attention
from .ops import DecodeSchedule
from .prefilling import OPENING, check_length, context_ids, prefix_ids, prefix_text, prompt_of, tokenizer_of
from .scoring import check_choice, score_chunks

logger = logging.getLogger(__name__)

Pieces = Iterable[str] | Iterable[Tensor]
"""A context in pieces: all text, or all token ids."""

_PASS = 4_000  # tokens of a segment per forward pass, which bounds the memory for activations
_SHARES = ("segment", "running", "final")


def prefill_compressed(
    model: Model,
    context: str | Int64[Tensor, " S"] | Pieces,
    ratio: SupportsFloat,
    *,
    segment: SupportsIndex = 16_000,
    share: str = "running",
    protect: Sequence[tuple[int, int]] = (),
    length: SupportsIndex | None = None,
    scope: str = "chunk",
    method: str = "kvzip",
    chunk: SupportsIndex = 2_000,
    hint: SupportsIndex = 8,
    system: str | None = None,
    instruction: str | None = None,
    template: bool = True,
    checkpoint: str | Path | None = None,
    save_every: SupportsIndex | None = None,
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
            there when an exception (Ctrl-C and a device without memory too) leaves the run, with every segment that was
            finished, and the file that was there stays until the new one is whole. It is removed at the end. A place
            that cannot be written and a file that is no checkpoint are refused before any work, and left as they are.
        save_every: writes the checkpoint after every so many segments too.
        progress: called with (context tokens done, context tokens in all or None) after each segment, and first of all
            with what a checkpoint has done already.

    Raises: ValueError for an empty context, one beyond `model.config.max_length`, options out of range, more protected
        pairs than the ratio keeps (of a segment, with share "segment"), a checkpoint of other arguments or another
        context, a file that is none; TypeError for pieces of mixed kinds and for what is no number; OSError for a
        checkpoint that cannot be written; torch.OutOfMemoryError that says what for.
    """
    check_kind(model, Model)
    if isinstance(context, (Tensor, bytes)) or not isinstance(context, Iterable):
        check_text_or_ids(context, "context")
    ratio, hint = checks.kept_ratio(ratio), checks.whole(hint, "hint", least=0)
    segment, chunk = checks.whole(segment, "segment", least=1), checks.whole(chunk, "chunk", least=1)
    length = None if length is None else checks.whole(length, "length", least=1)
    save_every = None if save_every is None else checks.whole(save_every, "save_every", least=1)
    check_choice(scope, method)
    if share not in _SHARES:
        raise ValueError(f"expected share to be one of {_SHARES}, got {share!r}: pass one of them")
    if all(spec.window is not None for spec in model.config.layers):
        raise ValueError("expected a model with global layers, got sliding windows in all: nothing can be compressed")
    if checkpoint is not None:
        check_path(checkpoint, "checkpoint")
    path = None if checkpoint is None else Path(checkpoint)
    note = None if path is None else _note_of(path)
    turn: dict[str, Any] = {"system": system, "instruction": instruction, "template": template}
    strips = template and prompt_of(model, system=system, instruction=instruction).strips
    context, opening = _opening(context, strips=strips)
    prefix = torch.tensor(prefix_ids(model, **turn, context=opening), dtype=torch.long)
    pieces, tokens = _pieces(model, context, before=prefix_text(model, **turn))
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
    settings |= {"template": bool(template), "prefix": prefix.tolist(), "expected": expected}
    end, source = len(prefix) + (expected or 0), f"{method}-{scope}"
    if path is not None and note is not None:
        run = _resume(model, path, settings, spans)
    else:
        run = _begin(model, prefix, bool(template), spans)
    known = tokens if share == "final" else None
    saved = len(run.token_ids)
    if progress is not None and note is not None:
        progress(saved - run.start, tokens)

    def write() -> None:
        nonlocal saved
        # at the end of the run the file is gone a moment before the cache is the caller's
        if path is not None and len(run.token_ids) > (saved if path.exists() else run.start):
            save(_cache_of(model, run, source, share), path, note=settings, overwrite=True)
            saved = len(run.token_ids)

    try:
        for number, ids in enumerate(_segments(pieces, segment, run.token_ids[run.start :]), start=1):
            with (
                torch.no_grad(),
                explain_out_of_memory(
                    f"the pairs and activations of {len(ids)} tokens beside {run.kept} kept pairs",
                    "lower segment, chunk or ratio",
                ),
            ):
                _extend(model, run, ids, ratio=ratio, share=share, known=known, end=end, scoring=scoring)
            if save_every is not None and number % save_every == 0:
                write()
            if progress is not None:
                progress(len(run.token_ids) - run.start, tokens)
        done = len(run.token_ids) - run.start
        if not done:
            raise ValueError(
                "expected a context of at least one token, got an empty one: pass the document's text or ids"
            )
        if tokens is None:
            _check_protected(spans, done, **limits)
        cache = _cache_of(model, run, source, share)
        if path is not None:
            path.unlink(missing_ok=True)
        return cache
    except BaseException as error:
        try:
            write()
        except Exception as failure:  # the error that ended the run is the one to see
            logger.error("%s could not be written and is as it was before: %s", path, failure)
        else:
            if isinstance(error, torch.OutOfMemoryError) and path is not None and path.exists():
                raise torch.OutOfMemoryError(f"{error}; what is done is in {path.name}") from error
        raise


@dataclass(frozen=True)
class _Unpacked:
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
class _Run:
    """What is held between two segments, and while the latest is packed.

    ranks[i]: the score of each row of layer i, infinite for the prefix's and those protected; None for window layers.
    scores: of all context tokens so far, by segment, on the host.
    spans: the context tokens that stay whatever their score.
    """

    context: list[Any]  # RaggedKV or WindowKV; _Unpacked until `_pack_` has been there
    ranks: list[Float32[Tensor, " _"] | None]
    start: int
    chat: bool
    token_ids: Int64[Tensor, " S"]
    kept: int
    scores: tuple[Float32[Tensor, "L H _"], ...]
    spans: list[tuple[int, int]]


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


def _note_of(path: Path) -> dict[str, Any] | None:
    """The note of the checkpoint that goes on, None where there is none yet.

    Raises: OSError now, not after hours of work, where no file can be written; ValueError for another kind of file.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"expected a directory to write the checkpoint {path.name} in, got no {path.parent}: make it first"
        )
    try:  # under a name like that of `save`, beside the file
        tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".probe.partial", dir=path.parent).close()
    except OSError as error:
        reason = f"expected a checkpoint that can be written, got {error.strerror!r}: name a file elsewhere"
        raise type(error)(error.errno, reason, str(path)) from error
    if not os.path.lexists(path):  # a link to nothing is refused when the file is written, after the work
        return None
    if not path.is_file():
        raise ValueError(f"expected a file for the checkpoint, got {path}, which is none: name a file")
    try:
        note = read_header(path).get("note")
    except ValueError as error:
        raise _no_checkpoint(path, str(error)) from error
    return note


def _no_checkpoint(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"expected a checkpoint of prefill_compressed, got {path.name}, which is left as it is ({reason}): name another"
    )


def _resume(model: Model, path: Path, settings: dict[str, Any], spans: list[tuple[int, int]]) -> _Run:
    """The run that a checkpoint holds. Raises ValueError if it is none, or was made with other arguments."""
    with open_file(path) as file:  # once, so that settings and pairs are of one file, whatever replaces it meanwhile
        _check_settings(path, check_header(file)["note"], settings)
        check_content(file)
        cache = read_cache(file, model=model)
    if not isinstance(cache, RaggedCache) or cache.scores is None or cache.tail is not None:
        raise _no_checkpoint(path, "it holds another kind of cache")
    packed = [x for layer in cache.context for x in (layer.k, layer.v) if not isinstance(x, Tensor)]
    prefix = cache.token_ids[: cache.start].tolist()
    if packed or (prefix, cache.chat) != (settings["prefix"], settings["template"]):
        raise _no_checkpoint(path, "its pairs are not those of its settings")
    return _run_of(cache, (cache.scores.values.cpu(),), spans)


def _check_settings(path: Path, note: dict[str, Any], settings: dict[str, Any]) -> None:
    if not note.keys() >= settings.keys():
        raise _no_checkpoint(path, "its note holds no settings of a run")
    for name, value in settings.items():
        if json.dumps(note[name]) != json.dumps(value):
            wanted, got = f"with {name}={value}", reprlib.repr(note[name])
            if name == "expected" and type(value) is type(note[name]) is int:
                wanted, got = f"over {value:,} tokens", f"one over {note[name]:,}"
            raise ValueError(
                f"expected a checkpoint of a run {wanted}, got {got} in {path.name}: "
                "give the arguments that it was begun with, or another file"
            )


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
    """Prefills, scores and packs one segment. Interrupted anywhere, the run is what it was or what it is after it."""
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
    chosen = iter(zip(_choose(run, ranks, kept, everything=share == "segment"), ranks, strict=True))
    context = [
        new if isinstance(new, WindowKV) else _unpacked(held, new, *next(chosen), first=len(run.token_ids))
        for held, new in zip(run.context, segment.layers, strict=True)
    ]
    token_ids, scores = torch.cat([run.token_ids, ids]), (*run.scores, values.cpu())
    vars(run).update(context=context, token_ids=token_ids, kept=kept, scores=scores)  # in one step
    del segment, context, values, ranks, chosen
    _pack_(run)


def _unpacked(held: RaggedKV, new: DenseKV, keep: list[Tensor], ranks: Tensor, *, first: int) -> _Unpacked:
    assert isinstance(held.k, Tensor) and isinstance(held.v, Tensor)
    parts = ((held.k, new.k), (held.v, new.v))
    return _Unpacked(*parts, held.offsets, held.positions, held.schedule, keep, ranks, first)


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
    """Which held rows and new tokens, of ranks `fresh`, stay: the prefix and `kept` pairs (see `_Unpacked.keep`).

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


def _pack_(run: _Run) -> None:
    """Packs the layers of a run, one after the other in place, and frees what they are gathered from.

    Each step puts a layer where the same layer was in more pieces, so that the run is the same after any of them, and
    whatever fails loses nothing. The memory added meanwhile is that of the keys or the values of one layer. Layers
    differ in what they keep, up to all of it: the longest come last, when most of the segment is gone.
    """
    sizes = [0 if rank is None else len(rank) for rank in run.ranks]
    for index in sorted(range(len(sizes)), key=sizes.__getitem__):
        if isinstance(run.context[index], _Unpacked):
            _pack_layer_(run, index)


def _pack_layer_(run: _Run, index: int) -> None:
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


def _on_host(layer: _Unpacked, start: int) -> RaggedKV:
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
    scored = tuple(i for i, layer in enumerate(run.context) if not isinstance(layer, WindowKV))
    length = len(run.token_ids)
    values = torch.empty(len(scored), model.config.num_kv_heads, length - run.start, dtype=torch.float32)
    for out, part in zip(values.split([part.shape[2] for part in run.scores], dim=2), run.scores, strict=True):
        out.copy_(part)
    return RaggedCache(
        context=tuple(_on_host(layer, run.start) if isinstance(layer, _Unpacked) else layer for layer in run.context),
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


def _opening(context: str | Tensor | Pieces, *, strips: bool) -> tuple[Any, str]:
    """The context, without white space in front of its text if the template strips it, and how its text begins."""
    if isinstance(context, Tensor):
        return context, ""
    if isinstance(context, str):
        context = context.lstrip() if strips else context
        return context, context[:OPENING]
    pieces, seen, opening = iter(context), [], ""
    for piece in pieces:
        if strips and not opening and isinstance(piece, str):
            piece = piece.lstrip()
        seen.append(piece)
        if not isinstance(piece, str):
            break
        opening += piece[:OPENING]
        if len(opening) >= OPENING:
            break
    return itertools.chain(seen, pieces), opening[:OPENING]


def _pieces(
    model: Model, context: str | Tensor | Pieces, *, before: str
) -> tuple[Iterator[Int64[Tensor, " S"]], int | None]:
    """The ids of a context in pieces, and how many they are if that is known."""
    if isinstance(context, (str, Tensor)):
        ids = context_ids(model, context, before=before)
        return iter([ids]), len(ids)
    pieces = iter(context)
    first = next(pieces, "")
    pieces = itertools.chain([first], pieces)
    if isinstance(first, str):
        encoded = prompts.encode_pieces(tokenizer_of(model), _all(pieces, str), before=before)
        return (torch.tensor(ids, dtype=torch.long) for ids in encoded), None
    return (context_ids(model, piece) for piece in _all(pieces, Tensor)), None


def _all(pieces: Iterator[Any], kind: type) -> Iterator[Any]:
    for piece in pieces:
        if not isinstance(piece, kind):
            raise TypeError(
                f"expected pieces that are all {kind.__name__}, got {type(piece).__name__}: pass text or tensors of ids"
            )
        check_text_or_ids(piece, "a piece")
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
