"""`kvzip compress`: documents into one file."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import documents
from .plumbing import (
    Stage,
    check_space,
    check_target,
    command,
    hint,
    is_kvzip_file,
    positive,
    put_json,
    resuming,
    size,
    stages,
    unwritten,
)
from .sources import load_model, model_options

if TYPE_CHECKING:
    from torch import Tensor

    from ..cache import RaggedCache
    from ..models import Model

RATIO = 0.3
SUFFIX = ".kvz"
SEGMENT = 16_000  # of which help and errors speak
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
@click.option(
    "-r", "--ratio", type=click.FloatRange(0, 1, min_open=True), help=f"Fraction of pairs KEPT [default: {RATIO}]."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="File to write [default: the document's name, .kvz]."
)
@click.option("--budget", type=click.FloatRange(0, min_open=True), help="Tokens kept per head, in place of a ratio.")
@click.option("--threshold", type=float, help="Keep every pair with at least this score, in place of a ratio.")
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
    type=click.Path(path_type=Path),
    help="Score by a file of `kvzip heads make` instead: no pass, whole heads.",
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
    heads: Path | None,
    chunk: int,
    segment: int | None,
    system: str | None,
    instruction: str | None,
    plain: bool,
    title: str | None,
    as_json: bool,
) -> None:
    """Compress documents into one file.

    DOC is a file of text, Markdown or PDF, a directory (its text files as one context), or - for standard input.
    """
    if sum(x is not None for x in (ratio, budget, threshold)) > 1:
        raise click.UsageError("expected one of --ratio, --budget and --threshold, got several")
    if segment and (budget or threshold is not None or level or bits or heads):
        raise click.UsageError("--segment takes a --ratio only: no --budget, --threshold, --level, --bits or --heads")
    if heads and scope:
        raise click.UsageError("--heads takes no --scope: nothing is scored")
    ratio = RATIO if ratio is None and budget is None and threshold is None else ratio
    output = output or Path(_stem(documents_) + SUFFIX)
    check_target(output, kind="file of kvzip", ours=is_kvzip_file)
    text, named = documents.read(documents_)
    note: dict[str, Any] = {"title": title or named, "documents": list(documents_)}
    seconds: dict[str, float] = {}
    prompt = {"system": system, "instruction": instruction, "template": not plain}
    scoring: dict[str, Any] = {"scope": scope or "chunk", "method": method, "chunk": chunk}
    from ..cache import save

    with resuming(lambda: _left(output, segment)), stages() as stage:
        loaded = load_model(stage, model, dtype=dtype, device=device, max_length=max_length, rope=rope)
        note["load"] = {"max_length": max_length, "rope": rope}
        if segment:
            full, cache = _in_segments(
                stage,
                loaded,
                text,
                output,
                seconds,
                ratio=ratio or RATIO,
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
            full, cache = _at_once(
                stage,
                loaded,
                text,
                output,
                seconds,
                how=how | ({"level": level} if level else {}),
                scoring=scoring,
                heads=heads,
                prompt=prompt,
            )
        stage(f"writing {output.name}")
        note["seconds"] = {name: round(value, 3) for name, value in seconds.items()}
        note["full_bytes"] = full
        save(cache, output, note=note, model=loaded, score_bits=8)
    _report(output, cache, note, as_json)


def _left(output: Path, segment: int | None) -> str:
    """What to say after Ctrl-C."""
    partial = _partial(output)
    if segment is None:
        return f"{unwritten(output)}, or with --segment {SEGMENT}, which can go on where it stopped"
    if partial.exists():
        return f"what is done is in {partial}: the same command goes on from there"
    return unwritten(output)


def _partial(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


def _stem(sources: tuple[str, ...]) -> str:
    if sources[0] == "-":
        return "stdin"
    name = documents.title_of(sources[0])
    return name.rpartition(".")[0] or name


def _at_once(
    stage: Stage,
    model: "Model",
    text: str,
    output: Path,
    seconds: dict[str, float],
    *,
    how: dict[str, Any],
    scoring: dict[str, Any],
    heads: Path | None,
    prompt: dict[str, Any],
) -> "tuple[int, RaggedCache]":
    """The full cache's bytes, and the compressed cache by way of it."""
    from .. import compression, head_scores, prefilling
    from .. import scoring as scorer
    from ..cache import nbytes

    begun = time.monotonic()
    chosen = None if heads is None else head_scores.load(heads, model=model)
    ids = prefilling.context_ids(model, text)
    prefix = prefilling.prefix_ids(model, **prompt)
    _check_length(model, ids, prefix, chunk=None if heads else scoring["chunk"], chat=prompt["template"])
    whole = prefilling.dense_bytes(model, len(prefix) + len(ids))
    _check_memory(model, whole, len(ids))
    if how["ratio"] is not None:
        packing = 1 if how["bits"] is None else how["bits"] / (8 * model.dtype.itemsize)
        check_space(output, int(how["ratio"] * packing * whole))
    progress = stage("reading the document")
    progress(0, len(prefix) + len(ids))
    step = PREFILL_CHUNK[model.device.type == "cuda"]
    dense = prefilling.prefill(model, ids, **prompt, chunk=step, progress=progress)
    seconds["prefill"] = time.monotonic() - begun
    full = nbytes(dense)
    begun = time.monotonic()
    if chosen is None:
        progress = stage("scoring pairs")
        progress(0, len(ids))
        dense = scorer.score(model, dense, **scoring, progress=progress)
    else:
        dense = head_scores.attach(dense, chosen)
        how = {"level": "head", "sink": chosen.sink, "recent": chosen.recent} | how
    seconds["score"] = time.monotonic() - begun
    begun = time.monotonic()
    stage("dropping the others")
    small = compression.compress(dense, **how, consume=True)
    seconds["compress"] = time.monotonic() - begun
    return full, small


def _in_segments(
    stage: Stage,
    model: "Model",
    text: str,
    output: Path,
    seconds: dict[str, float],
    *,
    ratio: float,
    **options: Any,
) -> "tuple[int, RaggedCache]":
    """The bytes that a full cache would have, and the compressed cache, made a segment at a time."""
    from .. import prefilling, streaming

    begun = time.monotonic()
    partial = _partial(output)
    ids = prefilling.context_ids(model, text)
    prefix = prefilling.prefix_ids(model, **{name: options[name] for name in ("system", "instruction", "template")})
    _check_length(model, ids, prefix, chunk=options["chunk"], chat=options["template"])
    full = prefilling.dense_bytes(model, len(ids))
    check_space(output, int(ratio * full))
    if partial.exists():
        hint(f"going on with {partial}")
    progress = stage("reading and compressing")
    progress(0, len(ids))
    try:
        small = streaming.prefill_compressed(model, ids, ratio, **options, checkpoint=partial, progress=progress)
    except ValueError as error:
        if not partial.exists():
            raise
        raise ValueError(f"{error} (or delete {partial} to begin anew)") from error
    seconds["compress"] = time.monotonic() - begun
    return full, small


def _check_length(model: "Model", ids: "Tensor", prefix: list[int], *, chunk: int | None, chat: bool) -> None:
    """Raises ValueError now, not after the prefill, if document and scoring need more positions than there are."""
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
        raise ValueError(
            f"expected a document that fits in {limit:,} positions (the model's length), got {length:,} tokens{scoring}"
            ": shorten it, or pass --max-length (and --rope) if the model can go further"
        )


def _check_memory(model: "Model", needed: int, tokens: int) -> None:
    """Raises MemoryError now if a full cache has no room: a host would be out of memory long after, all at once."""
    from ..cache import free_bytes

    free = free_bytes(model.device)
    if free is not None and needed > free:
        raise MemoryError(
            f"expected a document whose cache fits in memory, got {tokens:,} tokens that take {size(needed)} of "
            f"{size(free)} free: --segment {SEGMENT} never holds all of it, --dtype bfloat16 takes half"
        )


def _report(output: Path, cache: "RaggedCache", note: dict[str, Any], as_json: bool) -> None:
    from ..cache import nbytes

    facts = {
        "file": str(output),
        "title": note["title"],
        "tokens": cache.context_length,
        "kept": cache.kept,
        "total": cache.total,
        "ratio": cache.kept / cache.total,
        "method": cache.method,
        "full_bytes": note["full_bytes"],
        "cache_bytes": nbytes(cache),
        "file_bytes": output.stat().st_size,
        "seconds": note["seconds"],
    }
    if as_json:
        put_json(facts)
        return
    took = ", ".join(f"{name} {value:.1f} s" for name, value in note["seconds"].items())
    click.echo(
        f"{output}: {facts['tokens']:,} tokens, {facts['ratio']:.1%} of {cache.total:,} pairs kept, "
        f"cache {size(facts['full_bytes'])} -> {size(facts['cache_bytes'])} ({took})"
    )
    hint(f'ask it:  kvzip ask {output} "..."')
