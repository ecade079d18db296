"""`kvzip tune`: which ratio is enough for a document."""

import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..display import visible_line
from ..hub import Loading
from . import documents
from .ask import follow
from .compress import SUFFIX
from .output import echo, hint, put, put_json, say, size, stages
from .plumbing import FileName, Ratio, check_utf8, command, finite, positive, resuming
from .sources import find_model, load_model, model_options, short
from .targets import check_output, force_option, is_kvzip_file, say_replaced, unwritten

if TYPE_CHECKING:
    from ..tuning import Choice, Tuning

RATIOS = (0.1, 0.2, 0.3, 0.5, 0.7)


@command(
    "tune",
    epilog="""
    kvzip tune contract.pdf -m DIR
    kvzip tune contract.pdf -m DIR -o contract.kvz
    kvzip tune contract.pdf -m DIR -q "Who signed it?" -q "When?" -r 0.2 -r 0.4 --bits 8 --bits 4
    """,
)
@click.argument("documents_", metavar="DOC...", nargs=-1, required=True)
@model_options(required=True)
@click.option(
    "-q", "--question", "questions", multiple=True, help="In place of the model's own questions; may be repeated."
)
@click.option(
    "-r",
    "--ratio",
    "ratios",
    multiple=True,
    type=Ratio(),
    default=RATIOS,
    show_default=True,
    help="Fraction of pairs KEPT to try; may be repeated.",
)
@click.option(
    "--bits",
    multiple=True,
    type=click.Choice(["8", "4", "none"]),
    default=("8",),
    show_default=True,
    help="Tried at the ratio that is enough; may be repeated.",
)
@click.option(
    "--refit/--no-refit",
    default=True,
    show_default=True,
    help="Fit what is recommended, as `kvzip compress --refit` does.",
)
@click.option(
    "--keep",
    type=click.FloatRange(0, 1, min_open=True),
    callback=finite,
    default=0.95,
    show_default=True,
    help="Part of the full cache's answers that must be kept.",
)
@click.option(
    "--count", type=positive, help="Questions of the model's own, and as many passages [default: 5 to 8, by length]."
)
@click.option("-o", "--output", type=FileName(), help="Write the recommended file.")
@click.option("--system", help="System message.")
@click.option("--instruction", help="Opens the user turn, before the document.")
@click.option("--plain", is_flag=True, help="No chat template: for base models, whose questions continue the document.")
@force_option()
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def tune(
    documents_: tuple[str, ...],
    model: str,
    loading: Loading,
    questions: tuple[str, ...],
    ratios: tuple[float, ...],
    bits: tuple[str, ...],
    refit: bool,
    keep: float,
    count: int | None,
    output: Path | None,
    system: str | None,
    instruction: str | None,
    plain: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Find the ratio that is enough.

    The document is read and scored once. The model asks itself questions about it, answers them from the full cache,
    and compressed caches are compared with that, the largest first. The smallest that keeps enough answers is
    recommended, and written with -o. DOC is as for `kvzip compress`.
    """
    asked = [check_utf8(question.strip()) for question in questions]
    if not all(asked):
        raise click.UsageError("expected questions with text in them, got an empty one")
    held = check_output(output, kind="file of kvzip", ours=is_kvzip_file, force=force) if output else ""
    text, named = documents.read(documents_)
    directory = find_model(model)
    from .. import cache, prefilling, scoring, tuning

    begun = time.monotonic()
    with resuming(lambda: unwritten(output) if output else "nothing is written"), stages() as stage:
        loaded = load_model(stage, model, directory=directory, loading=loading)
        step = 16_000 if loaded.device.type == "cuda" else 1_000
        progress = stage("reading the document")
        full = prefilling.prefill(
            loaded, text, chunk=step, system=system, instruction=instruction, template=not plain, progress=progress
        )
        progress = stage("scoring pairs")
        full = scoring.score(loaded, full, progress=progress)
        found = tuning.tune(
            loaded,
            full,
            [follow(question, chat=not plain) for question in asked] or None,
            ratios=ratios,
            bits=[int(width) for width in bits if width != "none"],
            refit=refit,
            keep=keep,
            count=count,
            progress=stage,
        )
        seconds = time.monotonic() - begun
        if output:
            stage(f"writing {output.name}")
            note = {"title": visible_line(named), "documents": [*map(visible_line, documents_)]}
            note |= {"tuned": f"{found.recommended.answers} of {found.recommended.asked} answers kept"}
            cache.save(found.cache, output, note=note, model=loaded, score_bits=8, overwrite=bool(held))
    if output:
        say_replaced(output, held)
    if as_json:
        facts = {"model": loaded.source, "tokens": full.length, "full_bytes": found.full_bytes, "seconds": seconds}
        probes = [{"question": p.question, "answer": p.answer, "repeats": p.repeats} for p in found.probes]
        choices = [asdict(choice) for choice in found.choices]
        put_json(facts | {"recommended": asdict(found.recommended), "choices": choices, "questions": probes})
    else:
        _show(found, short(model), full.length, keep, seconds, own=not asked)
    if output:
        hint(f'ask it:  kvzip ask {shlex.quote(str(output))} "..."')
    elif not as_json:
        sources = " ".join(map(shlex.quote, documents_))
        best = found.recommended
        choice = f"-r {best.ratio:g}" + (f" --bits {best.bits}" if best.bits else "") + " --refit" * best.fitted
        hint(f"compress it:  kvzip compress {sources} -m {model} {choice}, or pass -o FILE{SUFFIX} here")


def _show(found: "Tuning", model: str, tokens: int, keep: float, seconds: float, *, own: bool) -> None:
    from rich.table import Table

    repeats = sum(probe.repeats for probe in found.probes)
    kinds = [f"{len(found.probes) - repeats} questions" + " of its own" * own] if len(found.probes) > repeats else []
    kinds += [f"{repeats} passages to repeat"] if repeats else []
    echo(f"{visible_line(model)} has read {tokens:,} tokens ({seconds:.0f} s) and was asked {' and '.join(kinds)}.")
    table = Table("kept", "answers kept", box=None, pad_edge=False)
    table.add_column("cache", justify="right")
    table.add_row("100%", f"{len(found.probes)} of {len(found.probes)}", size(found.full_bytes))
    for choice in found.choices:
        table.add_row(_named(choice), f"{choice.answers} of {choice.asked}", size(choice.cache_bytes))
    put("", table)
    echo()
    best = found.recommended
    if best.cache_bytes == found.full_bytes and best.ratio == 1:
        say("warning: none of these keeps enough answers: keep all pairs, or try larger ratios (-r 0.9)")
        return
    part = f"{best.answers} of {best.asked} answers, {size(best.cache_bytes)} in place of {size(found.full_bytes)}"
    echo(f"{_named(best)} is enough to keep {keep:.0%} of the answers: {part}.")


def _named(choice: "Choice") -> str:
    return f"{choice.ratio:.0%}" + (f" in {choice.bits} bits" if choice.bits else "") + ", fitted" * choice.fitted
