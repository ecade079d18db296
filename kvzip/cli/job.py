"""The work of `kvzip compress`: a document's text to a file, through the full cache or in segments."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import cache, compression, head_scores, inputs, options, prefilling, refitting, scoring, streaming
from ..cache import DenseCache, RaggedCache
from ..head_scores import HeadScores
from ..models import Model
from ..options import Budget, Refitting, Scoring, Turn
from . import ranks
from .output import Stage, hint, size
from .plumbing import resuming
from .targets import check_space, peek, unwritten

PREFILL_CHUNK = (1_000, 16_000)  # tokens at a time: on a CPU, few enough to show progress, and on a GPU
SEGMENT = 16_000  # the largest that messages advise


@dataclass(frozen=True)
class Job:
    """A document, how to compress it, and the file to write.

    `heads` are the scores by which whole heads are kept, None to score pairs. `positions` is how many the model was
    made for, None if unknown. `note` is what the file will say of the document.
    """

    text: str
    output: Path
    turn: Turn
    scoring: Scoring
    budget: Budget
    bits: tuple[int, int] | None
    refit: bool
    segment: int | None
    heads: HeadScores | None
    positions: int | None
    note: dict[str, Any]
    overwrite: bool


Made = tuple[RaggedCache, dict[str, Any]]
"""A compressed cache, and the note of its file."""


def run(stage: Stage, model: Model, job: Job) -> Made:
    """Writes the job's file, and returns the cache and the note that are in it.

    Raises: Stopped after Ctrl-C; ValueError, MemoryError or OSError, before the work, for what there is no room for;
        whatever the library raises.
    """
    begun = time.monotonic()
    prefix, ids = inputs.encode(model, job.text, job.turn)
    with resuming(lambda: left(job.output, job.segment, len(ids))):
        _check_length(model, job, prefix, ids)
        options.bits(job.bits, model.config.head_dim)
        make = _in_segments if job.segment else _at_once
        small, told = make(stage, model, job, len(prefix), len(ids), begun)
        stage(f"writing {job.output.name}")
        note = job.note | told
        cache.save(small, job.output, note=note, model=model, score_bits=8, overwrite=job.overwrite)
    return small, note


def scores_of(path: Path, model: Model, *, sink: int | None, recent: int | None) -> HeadScores:
    """Returns the head scores of a file, with what the other heads keep in place of what the file says."""
    scores = head_scores.load(path, model=model)
    sink, recent = scores.sink if sink is None else sink, scores.recent if recent is None else recent
    return replace(scores, sink=sink, recent=recent)


def left(output: Path, segment: int | None, tokens: int = 0) -> str:
    """Returns what to say after Ctrl-C: what is left, and how to go on.

    Args:
        tokens: of the document; 0 while that is not known.
    """
    partial = _partial(output)
    if segment is not None and ranks.count() == 1 and partial.exists():
        return f"what is done is in {partial}: the same command goes on from there"
    useful = _segment_for(tokens) if ranks.count() == 1 and tokens and (segment is None or segment >= tokens) else None
    return unwritten(output) + (f", or with --segment {useful}, which can go on where it stopped" if useful else "")


def _check_length(model: Model, job: Job, prefix: list[int], ids: Tensor) -> None:
    """Raises ValueError now, not after the prefill, if document and scoring need more positions than there are."""
    if len(ids) == 0:
        return
    length = len(prefix) + len(ids)
    needed, limit = length, model.config.max_length
    if job.heads is None:
        token_ids = torch.cat([torch.tensor(prefix, dtype=torch.long), ids])
        bare: DenseCache = DenseCache([], length, len(prefix), job.turn.template, token_ids, model.fingerprint)
        repeats = scoring.repeats(model, bare, chunk=job.scoring.chunk, hint=job.scoring.hint)
        needed += max(len(repeat) for _, _, repeat in repeats)
    if needed <= limit:
        return
    scored = f" and {needed - length:,} to score it (--chunk makes them fewer)" if needed > length else ""
    remedy = (
        "shorten it, or pass RoPE scaling (--rope, and --max-length); --segment does not help, nor does a longer "
        "--max-length alone: the model knows no more positions"
    )
    if job.positions is not None and limit < needed <= job.positions:
        remedy = f"pass a longer --max-length, or none: the model was made for {job.positions:,}"
    whose = "the model's length" if model.max_length is None else "--max-length"
    raise ValueError(
        f"expected a document that fits in {limit:,} positions ({whose}), got {length:,} tokens{scored}: {remedy}"
    )


def _at_once(stage: Stage, model: Model, job: Job, start: int, tokens: int, begun: float) -> Made:
    """Compresses the full cache. The note has what is new in it."""
    budget, scores, note = job.budget, job.heads, {}
    if scores is not None and tokens:
        heads, ends = scores.values.numel(), {"sink": scores.sink, "recent": scores.recent}
        whole = _whole_heads(scores, tokens, budget)
        note = {"heads": {"whole": whole, "heads": heads, **ends}}
        # half a head more than are kept, so that rounding cannot make it one less
        budget = replace(budget, ratio=min(1.0, (whole + 0.5) / heads), budget=None, level="head", **ends)
    full_bytes = prefilling.dense_bytes(model, start + tokens) + 8 * (start + tokens)  # and the ids, as in `nbytes`
    packing = 1 if job.bits is None else sum(job.bits) / (16 * model.dtype.itemsize)
    packed_bytes = min(budget.budget_bytes or int((budget.ratio or 0) * packing * full_bytes), full_bytes)
    _check_memory(model, full_bytes + packed_bytes * job.refit, tokens)
    if packed_bytes:
        check_space(job.output, ranks.count() * packed_bytes)
    progress = stage("reading the document")
    progress(0, start + tokens)
    step = PREFILL_CHUNK[model.device.type == "cuda"]
    dense = prefilling.prefill(model, job.text, **asdict(job.turn), chunk=step, progress=progress)
    prefilled = time.monotonic()
    if scores is None:
        progress = stage("scoring pairs")
        progress(0, tokens)
        dense = scoring.score(model, dense, **asdict(job.scoring), progress=progress)
    else:
        dense = head_scores.attach(dense, scores)
    scored = time.monotonic()
    stage("dropping the others")
    small = compression.compress(dense, **asdict(budget), bits=job.bits, consume=not job.refit)
    packed = time.monotonic()
    seconds = {"prefill": prefilled - begun, "score": scored - prefilled, "compress": packed - scored}
    if job.refit:
        progress = stage("fitting what is kept")
        progress(0, tokens)
        how = Refitting(chunk=job.scoring.chunk, hint=job.scoring.hint)
        small, mass = refitting.refit_and_measure(model, dense, small, how, progress=progress)
        note |= {"mass_kept": refitting.note_of(mass)}
        seconds["refit"] = time.monotonic() - packed
    return small, note | _seconds(**seconds)


def _in_segments(stage: Stage, model: Model, job: Job, start: int, tokens: int, begun: float) -> Made:
    """Compresses a segment at a time. The note has what is new in it."""
    assert job.segment is not None and job.budget.ratio is not None  # no other budget goes with --segment
    partial = _partial(job.output)
    check_space(job.output, int(ranks.count() * job.budget.ratio * prefilling.dense_bytes(model, start + tokens)))
    held = peek(partial)
    first, stop = held.get("start"), held.get("tokens")  # unchecked: anyone may have written the file
    done = max(0, stop - first) if isinstance(first, int) and isinstance(stop, int) else 0
    if partial.exists():
        hint(f"going on with {partial}, {done:,} of {tokens:,} tokens are done")
    progress = stage("reading and compressing")
    progress(done, tokens)
    try:
        small = streaming.prefill_compressed(
            model,
            job.text,
            job.budget.ratio,
            segment=job.segment,
            share="segment" if job.refit else "running",
            refit=job.refit,
            floor=job.budget.floor,
            **asdict(job.scoring),
            **asdict(job.turn),
            checkpoint=partial if model.share is None else None,
            progress=progress,
        )
    except ValueError as error:
        if not partial.exists():
            raise
        raise ValueError(f"{error} (or delete {partial} to begin anew)") from error
    return small, _seconds(compress=time.monotonic() - begun)


def _seconds(**stages: float) -> dict[str, Any]:
    return {"seconds": {name: round(value, 3) for name, value in stages.items()}}


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _check_memory(model: Model, needed: int, tokens: int) -> None:
    """Raises MemoryError now if the full cache has no room: a host notices late, and then ends the process."""
    free = cache.free_bytes(model.device)
    if free is None or needed <= free:
        return
    useful = _segment_for(tokens)
    remedy = [f"--segment {useful} never holds all of it"] if useful else []
    remedy += ["--dtype bfloat16 takes half"] if model.dtype.itemsize > 2 else []
    raise MemoryError(
        f"expected a document whose cache fits in memory, got {tokens:,} tokens that take {size(needed)} of "
        f"{size(free)} free: {', '.join([*remedy, 'a shorter document takes less'])}"
    )


def _whole_heads(scores: HeadScores, tokens: int, budget: Budget) -> int:
    """How many heads can stay whole.

    The ratio (or budget) is of all pairs: what the other heads keep of the beginning and the end counts, where
    `kvzip.compress` takes it on top.

    Raises: ValueError if the beginning and the end alone are more than the ratio.
    """
    heads, sink, recent = scores.values.numel(), scores.sink, scores.recent
    assert budget.budget is not None or budget.ratio is not None  # a threshold does not go with --heads
    room = budget.budget if budget.budget is not None else (budget.ratio or 0) * tokens  # tokens a head, on average
    ends = min(tokens, sink + recent)
    if ends > room:
        raise ValueError(
            f"expected room for the first {sink} and the last {recent} tokens in every head, which are "
            f"{ends / tokens:.1%} of {tokens:,} tokens, got room for {room / tokens:.1%}: keep more (-r), or lower "
            "--sink and --recent"
        )
    return heads if room >= tokens else int(heads * (room - ends) / (tokens - ends) + 1e-9)


def _segment_for(tokens: int) -> int | None:
    """A segment of whole thousands that a document has several of; None for one too short for that."""
    return min(SEGMENT, tokens // 2 // 1000 * 1000) or None
