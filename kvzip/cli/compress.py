"""`kvzip compress`: documents into one file."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..display import visible_line
from . import documents
from .plumbing import (
    FileName,
    Ratio,
    Stage,
    command,
    echo,
    finite,
    hint,
    positive,
    put_json,
    resuming,
    say,
    size,
    stages,
)
from .sources import find_heads, find_model, load_model, made_for, model_options
from .targets import check_space, check_target, force_option, is_kvzip_file, peek, say_replaced, unwritten

if TYPE_CHECKING:
    from torch import Tensor

    from ..cache import RaggedCache
    from ..head_scores import HeadScores
    from ..models import Model

RATIO = 0.3
SUFFIX = ".kvz"
SEGMENT = 16_000  # the largest that errors advise
PREFILL_CHUNK = (1_000, 16_000)  # tokens at a time on a CPU, which shows progress, and on a GPU


@command(
    "compress",
    epilog="""
    kvzip compress report.pdf -m qwen2.5-7b -r 0.3 -o report.kvz
    kvzip compress src/ notes.md -m DIR -o project.kvz
    cat log.txt | kvzip compress - -m DIR --bits 8 -o log.kvz
    kvzip compress book.txt -m DIR --segment 16000
    """,
)
@click.argument("documents_", metavar="DOC...", nargs=-1, required=True)
@model_options(required=True)
@click.option("-r", "--ratio", type=Ratio(), help=f"Fraction of pairs KEPT [default: {RATIO}].")
@click.option("-o", "--output", type=FileName(), help="File to write [default: the document's name, .kvz].")
@click.option(
    "--budget",
    type=click.FloatRange(0, min_open=True),
    callback=finite,
    help="Tokens kept per head, in place of a ratio.",
)
@click.option(
    "--threshold", type=float, callback=finite, help="Keep every pair with at least this score, in place of a ratio."
)
@click.option(
    "--level",
    type=click.Choice(["pair", "layer", "uniform", "head"]),
    help="Where the budget is shared [default: pair].",
)
@click.option("--bits", type=click.Choice(["8", "4"]), help="Pack what is kept into so many bits.")
@click.option(
    "--scope",
    type=click.Choice(["context", "chunk"]),
    help="What scoring attends to: all, or a chunk (linear cost) [default: chunk].",
)
@click.option(
    "--method",
    type=click.Choice(["kvzip", "kvzip+", "logit"]),
    default="kvzip",
    show_default=True,
    help="How pairs are scored.",
)
@click.option(
    "--heads",
    metavar="FILE|NAME",
    help="Keep whole heads by scores that `kvzip heads` made or has: no scoring pass.",
)
@click.option(
    "--sink",
    type=click.IntRange(min=0),
    help="With --heads: first tokens that the other heads keep, within the ratio [default: those of the scores].",
)
@click.option(
    "--recent",
    type=click.IntRange(min=0),
    help="With --heads: last tokens that the other heads keep, within the ratio [default: those of the scores].",
)
@click.option("--chunk", type=positive, default=2_000, show_default=True, help="Tokens of a repeat pass.")
@click.option(
    "--segment",
    type=positive,
    help="Never hold the full cache: so many tokens at a time. Can be interrupted and goes on.",
)
@click.option("--system", help="System message.")
@click.option("--instruction", help="Opens the user turn, before the document.")
@click.option("--plain", is_flag=True, help="No chat template: for base models, whose questions continue the document.")
@click.option("--title", help="What the document is called [default: its file name].")
@force_option()
@click.option("--json", "as_json", is_flag=True, help="Print facts as JSON.")
def compress(
    documents_: tuple[str, ...],
    model: str,
    dtype: str | None,
    device: str | None,
    max_length: int | None,
    rope: dict[str, Any] | None,
    ratio: float | None,
    output: Path | None,
    budget: float | None,
    threshold: float | None,
    level: str | None,
    bits: str | None,
    scope: str | None,
    method: str,
    heads: str | None,
    sink: int | None,
    recent: int | None,
    chunk: int,
    segment: int | None,
    system: str | None,
    instruction: str | None,
    plain: bool,
    title: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Compress documents into one file.

    DOC is a file of text, Markdown or PDF, a directory (its text files as one context), or - for standard input.
    """
    if sum(x is not None for x in (ratio, budget, threshold)) > 1:
        raise click.UsageError("expected one of --ratio, --budget and --threshold, got several")
    if segment and (budget or threshold is not None or level or bits or heads):
        raise click.UsageError("--segment takes a --ratio only: no --budget, --threshold, --level, --bits or --heads")
    if threshold is not None and level not in (None, "pair"):
        raise click.UsageError(f"--threshold takes no --level {level}: it keeps by score, no budget is shared")
    if heads and (scope or level or threshold is not None):
        raise click.UsageError("--heads takes no --scope, --level or --threshold: nothing is scored, heads stay whole")
    if not heads and (sink is not None or recent is not None):
        raise click.UsageError("--sink and --recent go with --heads: without it no head is dropped; see --help")
    ratio = RATIO if ratio is None and budget is None and threshold is None else ratio
    output = output or Path(_stem(documents_) + SUFFIX)
    chosen = None if heads is None else find_heads(heads)
    held = check_target(output, kind="file of kvzip", ours=is_kvzip_file, force=force)
    text, named = documents.read(documents_)
    own = made_for(find_model(model), rope=rope)
    note: dict[str, Any] = {"title": visible_line(title or named), "documents": [*map(visible_line, documents_)]}
    seconds: dict[str, float] = {}
    prompt = {"system": system, "instruction": instruction, "template": not plain}
    scoring: dict[str, Any] = {"scope": scope or "chunk", "method": method, "chunk": chunk}
    from ..cache import save

    read: list[int] = []  # how many tokens there are, once that is known

    with resuming(lambda: _left(output, segment, read)), stages() as stage:
        loaded = load_model(stage, model, dtype=dtype, device=device, max_length=max_length, rope=rope)
        if segment:
            assert ratio is not None  # no other budget goes with --segment
            cache = _in_segments(
                stage,
                loaded,
                text,
                output,
                seconds,
                read,
                own,
                ratio=ratio,
                segment=segment,
                **scoring,
                **prompt,
            )
        else:
            how: dict[str, Any] = {
                "ratio": ratio,
                "budget": budget,
                "threshold": threshold,
                "bits": int(bits) if bits else None,
            }
            cache = _at_once(
                stage,
                loaded,
                text,
                output,
                note,
                seconds,
                read,
                own,
                how=how | ({"level": level} if level else {}),
                scoring=scoring,
                heads=chosen,
                ends=(sink, recent),
                prompt=prompt,
            )
        stage(f"writing {output.name}")
        note["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
        save(cache, output, note=note, model=loaded, score_bits=8, overwrite=bool(held))
    say_replaced(output, held)
    _report(output, cache, note, as_json)


def _left(output: Path, segment: int | None, read: list[int]) -> str:
    """What to say after Ctrl-C."""
    partial = _partial(output)
    if segment is not None and partial.exists():
        return f"what is done is in {partial}: the same command goes on from there"
    useful = _segment_for(read[0]) if read and (segment is None or segment >= read[0]) else None
    return unwritten(output) + (f", or with --segment {useful}, which can go on where it stopped" if useful else "")


def _segment_for(tokens: int) -> int | None:
    """A segment that a document has several of, in thousands; None for a document too short to be worth it."""
    return min(SEGMENT, tokens // 2 // 1000 * 1000) or None


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _stem(sources: tuple[str, ...]) -> str:
    if sources[0] == "-":
        return "stdin"
    name = documents.name_of(sources[0])
    return name.rpartition(".")[0] or name


def _at_once(
    stage: Stage,
    model: "Model",
    text: str,
    output: Path,
    note: dict[str, Any],
    seconds: dict[str, float],
    read: list[int],
    own: int | None,
    *,
    how: dict[str, Any],
    scoring: dict[str, Any],
    heads: Path | None,
    ends: tuple[int | None, int | None],
    prompt: dict[str, Any],
) -> "RaggedCache":
    """The compressed cache by way of the full one."""
    from .. import compression, head_scores, inputs, prefilling
    from .. import scoring as scorer
    from ..options import Turn

    begun = time.monotonic()
    chosen = None if heads is None else head_scores.load(heads, model=model)
    prefix, ids = inputs.encode(model, text, Turn(**prompt))
    read.append(len(ids))
    _check_length(model, ids, prefix, own, chunk=None if heads else scoring["chunk"], chat=prompt["template"])
    if chosen is not None and len(ids):
        kept = _whole_heads(chosen, len(ids), how, ends)
        # between two fractions, so that no rounding makes it one head less
        share = min(1.0, (kept["whole"] + 0.5) / kept["heads"])
        how |= {"budget": None, "ratio": share, "level": "head", "sink": kept["sink"], "recent": kept["recent"]}
        note["heads"] = kept
    tokens = len(prefix) + len(ids)
    whole = prefilling.dense_bytes(model, tokens) + 8 * tokens  # pairs and ids, as `nbytes` counts them
    _check_memory(model, whole, len(ids))
    if how["ratio"] is not None:
        packing = 1 if how["bits"] is None else how["bits"] / (8 * model.dtype.itemsize)
        check_space(output, int(how["ratio"] * packing * whole))
    progress = stage("reading the document")
    progress(0, len(prefix) + len(ids))
    step = PREFILL_CHUNK[model.device.type == "cuda"]
    dense = prefilling.prefill(model, text, **prompt, chunk=step, progress=progress)
    seconds["prefill"] = time.monotonic() - begun
    begun = time.monotonic()
    if chosen is None:
        progress = stage("scoring pairs")
        progress(0, len(ids))
        dense = scorer.score(model, dense, **scoring, progress=progress)
    else:
        dense = head_scores.attach(dense, chosen)
    seconds["score"] = time.monotonic() - begun
    begun = time.monotonic()
    stage("dropping the others")
    small = compression.compress(dense, **how, consume=True)
    seconds["compress"] = time.monotonic() - begun
    return small


def _whole_heads(
    scores: "HeadScores", tokens: int, how: dict[str, Any], ends: tuple[int | None, int | None]
) -> dict[str, int]:
    """As many whole heads as the ratio (or budget) has room for, of how many, and the tokens that the others keep.

    The ratio is of all pairs: what the other heads keep of the beginning and the end is within it, where `compress`
    takes it on top.

    Raises: ValueError if that alone is more than the ratio.
    """
    sink, recent = (own if own is not None else of for own, of in zip(ends, (scores.sink, scores.recent), strict=True))
    heads, rest = scores.values.numel(), min(tokens, sink + recent)
    budget = how["budget"] if how["budget"] is not None else how["ratio"] * tokens  # tokens a head, on average
    if rest > budget:
        raise ValueError(
            f"expected room for the first {sink} and the last {recent} tokens in every head, which are "
            f"{rest / tokens:.1%} of {tokens:,} tokens, got room for {budget / tokens:.1%}: keep more (-r), or lower "
            "--sink and --recent"
        )
    whole = heads if budget >= tokens else int(heads * (budget - rest) / (tokens - rest) + 1e-9)
    return {"whole": whole, "heads": heads, "sink": sink, "recent": recent}


def _in_segments(
    stage: Stage,
    model: "Model",
    text: str,
    output: Path,
    seconds: dict[str, float],
    read: list[int],
    own: int | None,
    *,
    ratio: float,
    **options: Any,
) -> "RaggedCache":
    """The compressed cache, made a segment at a time."""
    from .. import inputs, prefilling, streaming
    from ..options import Turn

    begun = time.monotonic()
    partial = _partial(output)
    turn = {name: options[name] for name in ("system", "instruction", "template")}
    prefix, ids = inputs.encode(model, text, Turn(**turn))
    read.append(len(ids))
    _check_length(model, ids, prefix, own, chunk=options["chunk"], chat=options["template"])
    check_space(output, int(ratio * prefilling.dense_bytes(model, len(prefix) + len(ids))))
    done = _done(partial)
    if partial.exists():
        hint(f"going on with {partial}, {done:,} of {len(ids):,} tokens are done")
    progress = stage("reading and compressing")
    progress(done, len(ids))
    try:
        small = streaming.prefill_compressed(model, text, ratio, **options, checkpoint=partial, progress=progress)
    except ValueError as error:
        if not partial.exists():
            raise
        raise ValueError(f"{error} (or delete {partial} to begin anew)") from error
    seconds["compress"] = time.monotonic() - begun
    return small


def _done(partial: Path) -> int:
    """The context tokens that the file of an interrupted run holds, as far as it says."""
    held = peek(partial)
    tokens, start = held.get("tokens"), held.get("start")
    return max(0, tokens - start) if isinstance(tokens, int) and isinstance(start, int) else 0


def _check_length(
    model: "Model", ids: "Tensor", prefix: list[int], own: int | None, *, chunk: int | None, chat: bool
) -> None:
    """Raises ValueError now, not after the prefill, if document and scoring need more positions than there are.

    Args:
        own: positions that the model was made for, of which --max-length may leave fewer.
    """
    import torch

    from ..cache import DenseCache
    from ..scoring import repeats

    if len(ids) == 0:
        return
    length = len(prefix) + len(ids)
    needed, limit = length, model.config.max_length
    if chunk is not None:
        token_ids = torch.cat([torch.tensor(prefix, dtype=torch.long), ids])
        bare: DenseCache = DenseCache([], length, len(prefix), chat, token_ids, model.fingerprint)
        needed += max(len(repeat) for _, _, repeat in repeats(model, bare, chunk=chunk, hint=8))
    if needed > limit:
        scoring = f" and {needed - length:,} to score it (--chunk makes them fewer)" if needed > length else ""
        remedy = (
            "shorten it, or pass RoPE scaling (--rope, and --max-length); --segment does not help, nor does a longer "
            "--max-length alone: the model knows no more positions"
        )
        if own is not None and limit < needed <= own:
            remedy = f"pass a longer --max-length, or none: the model was made for {own:,}"
        whose = "the model's length" if model.max_length is None else "--max-length"
        raise ValueError(
            f"expected a document that fits in {limit:,} positions ({whose}), got {length:,} tokens{scoring}: {remedy}"
        )


def _check_memory(model: "Model", needed: int, tokens: int) -> None:
    """Raises MemoryError now if a full cache has no room: a host would be out of memory long after, all at once."""
    from ..cache import free_bytes

    free = free_bytes(model.device)
    if free is not None and needed > free:
        useful = _segment_for(tokens)
        remedy = [f"--segment {useful} never holds all of it"] if useful else []
        remedy += ["--dtype bfloat16 takes half"] if model.dtype.itemsize > 2 else []
        raise MemoryError(
            f"expected a document whose cache fits in memory, got {tokens:,} tokens that take {size(needed)} of "
            f"{size(free)} free: {', '.join([*remedy, 'a shorter document takes less'])}"
        )


def _report(output: Path, cache: "RaggedCache", note: dict[str, Any], as_json: bool) -> None:
    from ..cache import WindowKV, full_nbytes, nbytes

    name, ratio = visible_line(str(output)), cache.kept / cache.total
    windows = [layer for layer in cache.context if isinstance(layer, WindowKV)]
    facts = {
        "file": str(output),
        "title": note["title"],
        "tokens": cache.context_length,
        "kept": cache.kept,
        "total": cache.total,
        "ratio": ratio,
        "method": cache.method,
        "layers": len(cache.context),
        "window_layers": len(windows),
        "full_bytes": full_nbytes(cache),
        "cache_bytes": nbytes(cache),
        "file_bytes": output.stat().st_size,
        "seconds": note["seconds"],
    }
    if "heads" in note:
        facts["heads"] = note["heads"]
    if as_json:
        put_json(facts)
    else:
        took = ", ".join(f"{name} {value:.1f} s" for name, value in note["seconds"].items())
        echo(
            f"{name}: {facts['tokens']:,} tokens, {ratio:.1%} of {cache.total:,} pairs kept, "
            f"cache {size(facts['full_bytes'])} -> {size(facts['cache_bytes'])} ({took})"
        )
        if "heads" in note:
            echo(whole_heads_line(note["heads"]))
        if windows:
            echo(windows_line(len(windows), len(cache.context)))
    if f"{ratio:.1%}" == "0.0%":
        say(f"warning: {cache.kept:,} of {cache.total:,} pairs are kept, answers cannot know the document: keep more")
    hint(f'ask it:  kvzip ask {shlex.quote(str(output))} "..."')


def windows_line(windows: int, layers: int) -> str:
    """Returns what to say of a model that has window layers."""
    return (
        f"windows  {windows} of {layers} layers see their last tokens only and stay as they are: "
        f"only the pairs of the other {layers - windows} are counted and dropped"
    )


def whole_heads_line(heads: dict[str, int]) -> str:
    """Returns what to say of a file whose heads are kept or dropped whole; `heads` is its note's."""
    if heads["whole"] == heads["heads"]:
        return f"heads    all {heads['heads']} are whole"
    return (
        f"heads    {heads['whole']} of {heads['heads']} are whole, the others keep the first {heads['sink']} and the "
        f"last {heads['recent']} tokens, which the ratio includes"
    )
