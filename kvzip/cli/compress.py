"""`kvzip compress`: documents into one file."""

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..display import visible_line
from ..hub import Loading
from ..ratios import FLOOR
from . import documents
from .output import echo, hint, put_json, say, size, stages
from .plumbing import Bits, FileName, Ratio, command, finite, in_bytes, positive, resuming
from .ranks import agreed, share_of
from .sources import find_heads, find_model, load_model, made_for, model_options
from .targets import check_output, force_option, is_kvzip_file, say_replaced

if TYPE_CHECKING:
    from .. import refitting
    from ..cache import RaggedCache

RATIO = 0.3
SUFFIX = ".kvz"


@command(
    "compress",
    shares=True,
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
    "--budget-bytes",
    metavar="SIZE",
    callback=in_bytes,
    help="Keep as many pairs as fit into a cache of this size, as 12MB, in place of a ratio.",
)
@click.option(
    "--threshold", type=float, callback=finite, help="Keep every pair with at least this score, in place of a ratio."
)
@click.option(
    "--level",
    type=click.Choice(["pair", "layer", "uniform", "head"]),
    help="Where the budget is shared [default: pair].",
)
@click.option(
    "--bits",
    type=Bits(),
    metavar="[8|4|2|8,4|...]",
    help="Pack what is kept into so many bits; 8,4: keys in 8 and values in 4.",
)
@click.option(
    "--refit",
    is_flag=True,
    help="Fit biases and new values, so that what is kept gets the attention of all: one more pass. With --segment, "
    "each segment keeps its own share.",
)
@click.option(
    "--floor",
    type=click.FloatRange(0, 1),
    callback=finite,
    help=f"Part of an equal share that every head keeps at least [default: {FLOOR} with --refit, otherwise 0].",
)
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
    "--heads", metavar="FILE|NAME", help="Keep whole heads by scores that `kvzip heads` made or has: no scoring pass."
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
    loading: Loading,
    ratio: float | None,
    output: Path | None,
    budget: float | None,
    budget_bytes: int | None,
    threshold: float | None,
    level: str | None,
    bits: tuple[int, int] | None,
    refit: bool,
    floor: float | None,
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

    DOC is a file of text, Markdown, HTML, Word or PDF, a directory (its text files as one context), or - for standard
    input.
    """
    others = (budget, budget_bytes, threshold)
    if sum(x is not None for x in (ratio, *others)) > 1:
        raise click.UsageError("expected one of --ratio, --budget, --budget-bytes and --threshold, got several")
    if segment and (any(x is not None for x in others) or level or bits or heads):
        raise click.UsageError(
            "--segment takes a --ratio only: no --budget, --budget-bytes, --threshold, --level, --bits or --heads"
        )
    if threshold is not None and level not in (None, "pair"):
        raise click.UsageError(f"--threshold takes no --level {level}: it keeps by score, no budget is shared")
    if heads and (scope or level or threshold is not None or budget_bytes is not None):
        raise click.UsageError(
            "--heads takes no --scope, --level, --threshold or --budget-bytes: nothing is scored, heads stay whole"
        )
    if not heads and (sink is not None or recent is not None):
        raise click.UsageError("--sink and --recent go with --heads: without it no head is dropped; see --help")
    if floor and (heads or threshold is not None or level == "head"):
        raise click.UsageError(
            "--floor takes no --heads, --threshold or --level head: it is a part of each head's share"
        )
    if floor is None:
        floor = FLOOR if refit and not heads and threshold is None and level != "head" else 0.0
    ratio = RATIO if ratio is None and all(x is None for x in others) else ratio
    output = output or Path(_stem(documents_) + SUFFIX)
    scores = None if heads is None else find_heads(heads)
    share = share_of()
    held = agreed(share, partial(check_output, output, kind="file of kvzip", ours=is_kvzip_file, force=force))
    text, named = agreed(share, partial(documents.read, documents_))
    directory = find_model(model)
    positions = made_for(directory, rope=loading.rope)
    from .. import options  # torch is imported here, after all that can be refused without it
    from . import job

    with resuming(lambda: job.left(output, segment)), stages() as stage:
        loaded = load_model(stage, model, directory=directory, loading=loading)
        cache, note = job.run(
            stage,
            loaded,
            job.Job(
                text,
                output,
                turn=options.turn(system, instruction, not plain),
                scoring=options.scoring(scope or "chunk", method, chunk, 8),
                budget=options.budget(
                    ratio,
                    level=level or "pair",
                    budget=budget,
                    budget_bytes=budget_bytes,
                    threshold=threshold,
                    floor=floor,
                    biases=refit and budget_bytes is not None,
                ),
                bits=bits,
                refit=refit,
                segment=segment,
                heads=None if scores is None else job.scores_of(scores, loaded, sink=sink, recent=recent),
                positions=positions,
                note={"title": visible_line(title or named), "documents": [*map(visible_line, documents_)]},
                overwrite=bool(held),
            ),
        )
    say_replaced(output, held)
    _show(output, cache, note, as_json=as_json)


def _show(output: Path, cache: "RaggedCache", note: dict[str, Any], *, as_json: bool) -> None:
    """Prints facts of a file that was written: those of its cache and its note."""
    from .. import refitting
    from ..cache import WindowKV

    ratio = cache.kept / cache.total
    windows = sum(isinstance(layer, WindowKV) for layer in cache.context)
    facts = {
        "file": str(output),
        "title": note["title"],
        "tokens": cache.context_length,
        "kept": cache.kept,
        "total": cache.total,
        "ratio": ratio,
        "method": cache.method,
        "layers": len(cache.context),
        "window_layers": windows,
        **agreed(cache.share, lambda: _sizes(output)),
        "seconds": note["seconds"],
    }
    if "heads" in note:
        facts["heads"] = note["heads"]
    held = refitting.mass_of_note(note)
    if held is not None:
        facts["mass_kept"] = {"before": held.before.mean().item(), "after": held.after.mean().item()}
    if as_json:
        put_json(facts)
    else:
        took = ", ".join(f"{name} {value:.1f} s" for name, value in note["seconds"].items())
        echo(
            f"{visible_line(str(output))}: {facts['tokens']:,} tokens, {ratio:.1%} of {facts['total']:,} pairs "
            f"kept, cache {size(facts['full_bytes'])} -> {size(facts['cache_bytes'])} ({took})"
        )
        if "heads" in note:
            echo(whole_heads_line(note["heads"]))
        if held is not None:
            echo(mass_line(held))
        if windows:
            echo(windows_line(windows, facts["layers"]))
    if f"{ratio:.1%}" == "0.0%":
        say(f"warning: {cache.kept:,} of {cache.total:,} pairs are kept, answers cannot know the document: keep more")
    hint(f'ask it:  kvzip ask {shlex.quote(str(output))} "..."')


def _sizes(output: Path) -> dict[str, int]:
    """Bytes of the cache in a file, whoever has which part of it in memory."""
    from ..cache import full_nbytes, load_cache, nbytes

    cache = load_cache(output, pairs=False)
    return {"full_bytes": full_nbytes(cache) or 0, "cache_bytes": nbytes(cache), "file_bytes": output.stat().st_size}


def windows_line(windows: int, layers: int) -> str:
    """Returns what to say of a model that has window layers."""
    return (
        f"windows  {windows} of {layers} layers see their last tokens only and stay as they are: "
        f"only the pairs of the other {layers - windows} are counted and dropped"
    )


def mass_line(mass: "refitting.Mass") -> str:
    """Returns what to say of the attention that a refitted cache keeps."""
    (before, least), (after, lowest) = ((x.mean().item(), x.min().item()) for x in (mass.before, mass.after))
    return (
        f"refitted {after:.0%} of the repeat's attention in the mean head ({lowest:.0%} in the least), "
        f"{before:.0%} ({least:.0%}) without biases"
    )


def whole_heads_line(heads: dict[str, int]) -> str:
    """Returns what to say of a file whose heads are kept or dropped whole; `heads` is its note's."""
    if heads["whole"] == heads["heads"]:
        return f"heads    all {heads['heads']} are whole"
    return (
        f"heads    {heads['whole']} of {heads['heads']} are whole, the others keep the first {heads['sink']} and the "
        f"last {heads['recent']} tokens, which the ratio includes"
    )


def _stem(sources: tuple[str, ...]) -> str:
    if sources[0] == "-":
        return "stdin"
    name = documents.name_of(sources[0])
    return name.rpartition(".")[0] or name
