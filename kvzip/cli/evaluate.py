"""`kvzip eval`: how much quality is left."""

import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from ..display import visible_line
from ..hub import Loading
from .output import echo, put, put_json, say, stages
from .plumbing import FileName, Group, ListCommand, positive, resuming
from .sources import find_model, load_model, model_options
from .targets import check_output, force_option, is_page, say_replaced, unwritten

UNFINISHED = 75
"""Exit code of an evaluation whose time limit left work for the next run."""


RESUMES = "answers so far are in {}: the same command goes on from there"
_FIRST = b'{"kind": "run"'  # of a file of results
RESULTS = Path("kvzip-eval.jsonl")
PAGE = Path("kvzip-eval")


class _Evaluate(Group):
    """Options without a command are those of `run`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(
    "eval",
    cls=_Evaluate,
    epilog="""
    kvzip eval -m DIR --task squad@2000 --data DATA --method full kvzip snapkv --ratio 0.1 0.3 1.0 -o results.jsonl
    kvzip eval report results.jsonl -o report/
    kvzip eval tasks
    """,
)
def evaluate() -> None:
    """Measure how much quality is left.

    Options without a command are those of `run`.
    """


def _ratios(ctx: click.Context, option: click.Parameter, words: Sequence[str]) -> tuple[float, ...]:
    try:
        return ratios_of(words)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, option) from error


@evaluate.command(
    "run",
    cls=ListCommand,
    shares=True,
    epilog=f"""
    kvzip eval -m DIR --task kv@4096 --ratio 0.1 ... 1.0 --method full,kvzip,snapkv
    kvzip eval -m DIR --task squad@2000 ruler@4096 --ratio 0.3 0.5 --data DATA -o results.jsonl
    kvzip eval report results.jsonl -o report    # without names: {RESULTS}, {PAGE}
    """,
)
@model_options(required=True)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    required=True,
    metavar="NAME[@LENGTH]",
    help="One or more, see `kvzip eval tasks`.",
)
@click.option("--method", "methods", multiple=True, default=("full", "kvzip"), show_default=True, help="One or more.")
@click.option(
    "--ratio",
    "ratios",
    multiple=True,
    metavar="RATIO",
    callback=_ratios,
    default=("0.1", "0.2", "0.3", "0.5", "0.7"),
    show_default=True,
    help="Fractions KEPT: one or more, a range 0.1:0.5:0.1, or 0.1 ... 1.0 in tenths.",
)
@click.option(
    "-o",
    "--out",
    type=FileName(),
    default=RESULTS,
    show_default=True,
    help="File of JSON lines; a run goes on where it stopped.",
)
@click.option("--form", type=click.Choice(["chat", "cloze"]), help="[default: chat where the model has a template]")
@click.option("--count", type=positive, default=10, show_default=True, help="Contexts of a task.")
@click.option("--questions", type=positive, default=10, show_default=True, help="Questions about a context.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--data", metavar="DIR", help='Directory of JSONL files, or "hub".')
@click.option("--batch", type=positive, default=32, show_default=True, help="Questions answered at once.")
@click.option("--max-tokens", type=positive, help="Tokens of an answer, if fewer than its task says.")
@click.option(
    "--limit",
    "limit_s",
    type=float,
    metavar="SECONDS",
    help=f"Begin no further batch after so long; exits with {UNFINISHED} if work is left.",
)
@click.option("--commit", help="Commit to write down, where git cannot be asked.")
def run(model: str, loading: Loading, out: Path, **asked: Any) -> None:
    """Answer the questions of tasks, by methods, at ratios."""
    # the other options have the names of `run_eval`'s arguments
    directory = find_model(model)
    check_output(out, kind="file of results", ours=_is_results)  # a run goes on with it, and replaces nothing
    from ..evals import run_eval
    from ..evals.plan import check_names
    from ..evals.results import check_growing

    check_growing(out)
    check_names(*(asked[key] for key in ("tasks", "methods", "ratios", "form")))  # before the model is loaded
    logging.getLogger("kvzip.evals").setLevel(logging.INFO)
    with resuming(lambda: RESUMES.format(out) if out.exists() else unwritten(out)), stages() as stage:
        loaded = load_model(stage, model, directory=directory, loading=loading)
        bar, line = stage("answering"), _line_of_progress()

        def shown(finished: int, total: int, what: str) -> None:
            bar(finished, total)
            line(finished, total, what)

        done = run_eval(loaded, out=out, progress=shown, **asked)
    outcome = "all answered" if done else "stopped at the time limit, the same command goes on"
    echo(f"{visible_line(str(out))}: {outcome}")
    if not done:
        raise click.exceptions.Exit(UNFINISHED)


def _line_of_progress(*, every_s: float = 30.0) -> Callable[[int, int, str], None]:
    """Returns a progress that says a line now and then where no bar is shown, as in a log."""
    first: list[tuple[float, int]] = []
    said = [time.monotonic()]

    def progress(finished: int, total: int, what: str) -> None:
        now = time.monotonic()
        if not first:
            first.append((now, finished))
        if sys.stderr.isatty() or now - said[0] < every_s or finished == first[0][1]:
            return
        said[0] = now
        left = (now - first[0][0]) / (finished - first[0][1]) * (total - finished)
        say(f"{finished:,} of {total:,} answers, {what}, {left / 60:.0f} min left")

    return progress


def ratios_of(words: Sequence[str]) -> tuple[float, ...]:
    """Returns ratios, each once and ascending, of words such as "0.3", "0.1:0.5:0.1" (a range), or "0.1 ... 1.0".

    The dots go on in the step of the two ratios before them, or in tenths where there is only one.

    Raises: ValueError for a word that is none of these, or a ratio outside (0, 1].
    """
    found: list[Fraction] = []
    dots = False
    for word in words:
        if word in ("...", "\u2026") and found and not dots:
            dots = True
            continue
        try:
            first, last, step = _range(word, found, dots)
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(
                f"expected ratios such as 0.3, 0.1:0.5:0.1 or 0.1 ... 1.0, got {' '.join(words)!r}"
            ) from error
        found += [first + n * step for n in range(int((last - first) / step) + 1)]
        dots = False
    if dots or not all(0 < ratio <= 1 for ratio in found):
        raise ValueError(
            f"expected ratios in (0, 1], the fraction of pairs that is KEPT, got {' '.join(words)!r}: 0.3 keeps 30%"
        )
    return tuple(sorted({float(ratio) for ratio in found}))


def _range(word: str, before: list[Fraction], dots: bool) -> tuple[Fraction, Fraction, Fraction]:
    """First, last and step of the ratios that a word adds to those before it; in fractions, as 3 * 0.1 is not 0.3."""
    if ":" in word:
        first, last, step = map(Fraction, word.split(":"))
    elif dots:
        step = before[-1] - before[-2] if len(before) > 1 else Fraction(1, 10)
        first, last = before[-1] + step, Fraction(word)
    else:
        first, last, step = Fraction(word), Fraction(word), Fraction(1)
    if step <= 0 or first > last:
        raise ValueError
    return first, last, step


def _is_results(path: Path) -> bool:
    """Whether a file is one that `run` may go on with."""
    with path.open("rb") as file:
        start = file.read(len(_FIRST))
    return _FIRST.startswith(start)  # a killed run may have written less than a line


@evaluate.command(
    "report",
    epilog="""
    kvzip eval report results.jsonl -o report/
    kvzip eval report results-*.jsonl -o report/
    """,
)
@click.argument("results", nargs=-1, type=FileName())
@click.option("-o", "--out", type=FileName(), default=PAGE, show_default=True, help="Directory for the report.")
@force_option()
def report(results: tuple[Path, ...], out: Path, force: bool) -> None:
    """Make a table, plots and a page of results."""
    results = results or (RESULTS,)
    for path in results:
        if not path.is_file():
            raise FileNotFoundError(f"expected a file of results, got no file {path}: kvzip eval run writes one")
    held = ""
    if out.is_dir():
        check_output(out / "table.md", kind="report")
        held = check_output(
            out / "index.html", kind="report", ours=lambda path: is_page(path, by="kvzip eval"), force=force
        )
    else:
        check_output(out, kind="report", ours=lambda path: False)
    from ..evals import write_report

    scratch = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    with resuming(lambda: unwritten(out)), scratch as directory:
        made = write_report(results, Path(directory))
        out.mkdir(exist_ok=True)
        if not held:
            for path in made:
                check_output(out / path.name, kind="report", ours=lambda path: False)
        for path in made:
            echo(visible_line(str(path.replace(out / path.name))))
    say_replaced(out / "index.html", held)


@evaluate.command(
    "tasks",
    epilog="""
    kvzip eval tasks
    kvzip eval tasks --json
    """,
)
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def tasks(as_json: bool) -> None:
    """List tasks, groups of them, and methods."""
    from rich.table import Table

    from ..evals import GROUPS, TASKS
    from ..evals.catalog import CATALOG

    if as_json:
        about = {task.name: {"length": task.length, "about": task.about} for task in TASKS.values()}
        methods = {name: {"level": level, "cite": cite} for name, (level, cite) in CATALOG.items()}
        put_json(
            {"tasks": about, "groups": {name: list(members) for name, members in GROUPS.items()}, "methods": methods}
        )
        return
    table = Table("task or group", "length", "what", box=None, pad_edge=False)
    for task in TASKS.values():
        table.add_row(task.name, str(task.length or "own"), task.about)
    for name, members in GROUPS.items():
        table.add_row(name, "", ", ".join(members))
    methods = Table("method", "level", "source", box=None, pad_edge=False)
    for name, about in CATALOG.items():
        methods.add_row(name, *about)
    put(table, "", methods)
