"""Prefill of contexts larger than memory: a segment at a time against the compressed past, packed before the next."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import SupportsFloat, SupportsIndex

import torch
from jaxtyping import Int64
from torch import Tensor

from .. import checks, options
from ..cache import RaggedCache, explain_out_of_memory, save
from ..checks import check_kind, check_path, check_text_or_ids
from ..inputs import check_length, prefix_ids, prefix_text, strips
from ..models import Model
from ..options import Refitting
from .checkpoints import is_begun, read
from .pieces import Pieces, ids_of, opening_of, segments_of
from .plan import Plan, check_protected, note_of
from .segments import begin, cache_of, extend, pack_, run_of

logger = logging.getLogger(__name__)

_SHARES = ("segment", "running", "final")


def prefill_compressed(
    model: Model,
    context: str | Int64[Tensor, " S"] | Pieces,
    ratio: SupportsFloat,
    *,
    segment: SupportsIndex = 16_000,
    share: str = "running",
    protect: Sequence[tuple[int, int]] = (),
    floor: SupportsFloat = 0.0,
    length: SupportsIndex | None = None,
    scope: str = "chunk",
    method: str = "kvzip",
    chunk: SupportsIndex = 2_000,
    hint: SupportsIndex = 8,
    refit: bool = False,
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
        share: how segments share the budget. "segment": each keeps its own int(ratio * pairs), so that none is ever
            dropped later. "running": after each segment the highest scored of all held and new pairs stay,
            int(ratio * pairs so far). "final": as "running" with int(ratio * all pairs) from the start, so that the
            highest scored of the whole context stay and early segments are compressed late. It needs the length, so
            the context must not come in pieces.
        protect: (start, stop) spans of context tokens, 0 the first after the prefix, that stay in all layers and heads,
            as in `compress`, even while the budget of the segments so far is smaller. In a context in pieces, whose end
            is unknown, a span may reach further than there are tokens.
        floor: part, from 0 to 1, of an equal share that every head keeps of each segment at least, as in `compress`.
        length: context tokens to expect where pieces do not tell. A repeat's positions start where the context ends, as
            in `score` (a question will come there). Without a length, or with one that is too small, they start at the
            segment's end, which keeps other pairs: an estimate is better than none.
        scope, method, chunk, hint: as in `score`; "context" is what is kept of the past and the whole segment.
        refit: fits each segment, as `kvzip.refit` does with the same chunk and hint, before it is packed and while all
            its pairs are held; at ratio 1 it fits nothing. Only with share "segment": the other shares drop rows later
            whose attention the biases of their neighbors do not stand for.
        system, instruction, template: as in `prefill`.
        checkpoint: a file. If it exists, the run goes on from the state in it, and ends with the same bits as one that
            was never interrupted: give the same arguments, with the context from its beginning. The state is written
            when an exception ends the run (Ctrl-C and a device out of memory too), with every finished segment, and
            the file that was there stays until the new one is whole. It is removed at the end. A place that cannot be
            written and a file that is no checkpoint are refused before any work, and left as they are.
        save_every: writes the checkpoint after every so many segments too.
        progress: called with (context tokens done, context tokens in all or None) after each segment, and first of all
            with what a checkpoint has done already.

    Raises: ValueError for an empty context, one beyond `model.config.max_length`, options out of range, more protected
        pairs than the ratio keeps (of a segment, with share "segment"), a checkpoint of other arguments or another
        context, another kind of file; TypeError for pieces of mixed kinds and for what is no number; OSError for a
        checkpoint that cannot be written; torch.OutOfMemoryError that says what for.
    """
    check_kind(model, Model)
    if isinstance(context, (Tensor, bytes)) or not isinstance(context, Iterable):
        check_text_or_ids(context, "context")
    ratio, segment = checks.kept_ratio(ratio), checks.whole(segment, "segment", least=1)
    scoring, spans = options.scoring(scope, method, chunk, hint), options.spans(protect)
    part = options.floor_of(floor)
    length = None if length is None else checks.whole(length, "length", least=1)
    save_every = None if save_every is None else checks.whole(save_every, "save_every", least=1)
    if share not in _SHARES:
        raise ValueError(f"expected share to be one of {_SHARES}, got {share!r}: pass one of them")
    if refit and share != "segment":
        raise ValueError(
            f"expected share 'segment' with refit=True, got {share!r}: later segments would drop rows that were fitted "
            "together with those that stay"
        )
    heads = sum(spec.window is None for spec in model.config.layers) * (model.whole or model.config).num_kv_heads
    if not heads:
        raise ValueError("expected a model with global layers, got sliding windows in all: nothing can be compressed")
    if checkpoint is not None:
        check_path(checkpoint, "checkpoint")
        if model.share is not None:
            raise ValueError(
                f"expected no checkpoint where {model.share.size} ranks share a model, got one: what is done when one "
                "of them ends cannot be collected; leave out checkpoint="
            )
    path = None if checkpoint is None else Path(checkpoint)
    begun = path is not None and is_begun(path)
    turn = options.turn(system, instruction, template)
    context, opening = opening_of(context, strips=strips(model, turn))
    prefix = prefix_ids(model, turn, context=opening)
    pieces, tokens = ids_of(model, context, before=prefix_text(model, turn))
    if tokens is None and share == "final":
        raise ValueError(
            "expected share 'segment' or 'running' for a context in pieces, got 'final': its end is unknown"
        )
    options.check_spans(spans, tokens)
    expected = length if tokens is None else tokens
    fitted = Refitting(chunk=scoring.chunk, hint=scoring.hint) if refit and ratio < 1 else None
    plan = Plan(ratio, segment, share, spans, scoring, turn.template, tuple(prefix), expected, fitted, part)
    if tokens is not None:
        check_protected(plan, heads, tokens)
    if expected is not None:
        needed = plan.start + expected + min(expected, scoring.chunk)
        check_length(model, needed, f"a prefix of {plan.start}, a context of {expected} tokens and a repeat pass")
    return _run(model, plan, pieces, tokens, path, begun=begun, save_every=save_every, told=progress)


def _run(
    model: Model,
    plan: Plan,
    pieces: Iterator[Int64[Tensor, " S"]],
    tokens: int | None,
    path: Path | None,
    *,
    begun: bool,
    save_every: int | None,
    told: Callable[[int, int | None], None] | None,
) -> RaggedCache:
    """Processes one segment after the other. `tokens`: how many the context has, None if that is not known.

    The state changes in one step, where `run` is assigned. So wherever an interruption comes, `run` is the state before
    or after a whole segment, and that is what the checkpoint gets.
    """
    run = run_of(read(model, path, plan), plan) if path is not None and begun else begin(model, plan)
    saved = len(run.token_ids)  # how many tokens the file holds
    if told is not None and begun:
        told(saved - plan.start, tokens)

    def write() -> None:
        nonlocal saved
        # a missing file holds nothing: an interruption after the last step removed it writes it again
        if path is not None and len(run.token_ids) > (saved if path.exists() else plan.start):
            save(cache_of(model, run, plan), path, note=note_of(plan), overwrite=True)
            saved = len(run.token_ids)

    try:
        for number, ids in enumerate(segments_of(pieces, plan.segment, run.token_ids[plan.start :]), start=1):
            with (
                torch.no_grad(),
                explain_out_of_memory(
                    f"the pairs and activations of {len(ids)} tokens beside {run.kept} kept pairs",
                    "lower segment, chunk or ratio",
                ),
            ):
                run = extend(model, run, ids, plan)
                pack_(run)
            if save_every is not None and number % save_every == 0:
                write()
            if told is not None:
                told(len(run.token_ids) - plan.start, tokens)
        cache, done = cache_of(model, run, plan), len(run.token_ids) - plan.start
        if not done:
            raise ValueError(
                "expected a context of at least one token, got an empty one: pass the document's text or ids"
            )
        if tokens is None:
            check_protected(plan, len(cache.scored_layers) * cache.all_heads, done)
        if path is not None:
            path.unlink(missing_ok=True)
        return cache
    except BaseException as error:
        try:
            write()
        except Exception as failure:  # logged, so that the error that ended the run is raised
            logger.error("%s could not be written and is as it was before: %s", path, failure)
        else:
            if isinstance(error, torch.OutOfMemoryError) and path is not None and path.exists():
                raise torch.OutOfMemoryError(f"{error}; what is done is in {path.name}") from error
        raise
