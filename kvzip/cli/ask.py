"""`kvzip ask`: answers out of a file, as they come."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..display import visible, visible_line
from ..hub import Loading
from .output import echo, hint, put_json, stages
from .plumbing import FileName, check_utf8, command, finite, positive, stdin_lines
from .ranks import agreed, share_of
from .sources import model_options, open_cache, short

if TYPE_CHECKING:
    from ..generation import Answer

SOURCES = 3


@dataclass(frozen=True)
class Answering:
    """How answers are chosen and where they end, by the names of `kvzip.generate`."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    repetition_penalty: float


def answer_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of `kvzip.generate` that say how answers are chosen, which a command takes as `answering`."""
    options = [
        click.option(
            "-n", "--max-tokens", type=positive, default=256, show_default=True, help="Tokens of an answer, at most."
        ),
        click.option(
            "-t",
            "--temperature",
            type=click.FloatRange(0),
            callback=finite,
            default=0.0,
            show_default=True,
            help="0 takes the most likely token.",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(0, 1, min_open=True),
            callback=finite,
            default=1.0,
            show_default=True,
            help="Sample among the most likely tokens of this probability.",
        ),
        click.option("--seed", type=int, callback=_seed, help="Of the sampling."),
        click.option(
            "--stop", multiple=True, metavar="TEXT", callback=_stops, help="Text that ends an answer; may be repeated."
        ),
        click.option(
            "--repetition-penalty",
            type=click.FloatRange(1),
            callback=finite,
            default=1.0,
            show_default=True,
            help="Above 1, what an answer has said becomes less likely: 1.1 ends most loops.",
        ),
    ]

    @wraps(function)
    def collected(**given: Any) -> Any:
        return function(answering=Answering(*(given.pop(field.name) for field in fields(Answering))), **given)

    for option in reversed(options):
        collected = option(collected)
    return collected


def _seed(ctx: click.Context, option: click.Parameter, value: int | None) -> int | None:
    if value is not None and not -(2**63) <= value < 2**64:
        raise click.BadParameter(f"expected a seed from -2**63 to 2**64 - 1, got {value}", ctx, option)
    return value


def _stops(ctx: click.Context, option: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    if "" in value:
        raise click.BadParameter("expected text that ends an answer, got none: leave it out", ctx, option)
    return value


@command(
    "ask",
    shares=True,
    epilog="""
    kvzip ask contract.kvz "Who signed it?"
    kvzip ask contract.kvz "Who signed it?" "When?" "What does it cost?"
    kvzip ask contract.kvz --json - < questions.txt
    """,
)
@click.argument("file", type=FileName())
@click.argument("questions", metavar="QUESTION...", nargs=-1, required=True)
@answer_options
@model_options(required=False)
@click.option(
    "--sources",
    "named",
    is_flag=True,
    help=f"After each answer, the {SOURCES} passages of the document that it attended to most.",
)
@click.option("--json", "as_json", is_flag=True, help="Print questions, answers and times as JSON.")
def ask(
    file: Path,
    questions: tuple[str, ...],
    answering: Answering,
    model: str | None,
    loading: Loading,
    named: bool,
    as_json: bool,
) -> None:
    """Ask questions of a compressed file.

    QUESTION may be - to read questions from standard input, one a line. They are answered as one batch, each by
    itself, and none changes the file.
    """
    lines = agreed(
        share_of(), lambda: [line.strip() for q in questions for line in (stdin_lines() if q == "-" else [q])]
    )
    asked = [check_utf8(line) for line in lines if line]
    if not asked:
        raise click.UsageError("expected a question, got none with text in it")
    begun = time.monotonic()
    with stages() as stage:
        loaded, cache, _ = open_cache(stage, file, model=model, loading=loading)
    from ..generation import generate

    load_s, begun = time.monotonic() - begun, time.monotonic()
    with _shown(asked, as_json) as (on_token, finish):
        queries = [follow(q, chat=cache.chat) for q in asked]
        sources = SOURCES if named else 0
        answers = generate(
            loaded, cache, queries, template=cache.chat, sources=sources, on_token=on_token, **vars(answering)
        )
        finish([answer.text for answer in answers], [source_lines(answer) for answer in answers])
    answer_s = time.monotonic() - begun
    tokens = sum(len(answer.token_ids) for answer in answers)
    if as_json:
        listed = [
            {"question": q, "answer": a.text, "tokens": len(a.token_ids), "stopped": a.stopped}
            | ({"sources": [asdict(source) for source in a.sources]} if named else {})
            for q, a in zip(asked, answers, strict=True)
        ]
        put_json({"file": str(file), "model": loaded.source, "answers": listed, "load_s": load_s, "answer_s": answer_s})
    hint(f"{tokens} tokens in {answer_s:.1f} s by {short(loaded.source)}, loaded in {load_s:.1f} s")


def follow(question: str, *, chat: bool) -> str:
    """Returns a question as it follows a document: without a chat template it begins a new paragraph."""
    from ..prompts import QUERY_SEPARATOR

    return question if chat else QUERY_SEPARATOR + question


def source_lines(answer: "Answer") -> str:
    """Returns what to show of an answer's sources, a line for each; "" if it has none."""
    lines = []
    for source in answer.sources:
        text = visible_line(" ".join(source.text.split()), limit=240)
        lines.append(f"    {source.weight:4.0%} of its attention, tokens {source.start:,} to {source.stop:,}: {text}")
    return "".join(f"\n{line}" for line in lines)


OnToken = Callable[[str, int], None]
Finish = Callable[[list[str], list[str]], None]
"""finish(texts, extras) shows what is left of answers, and after each what belongs to it."""


@contextmanager
def _shown(asked: list[str], as_json: bool) -> Iterator[tuple[OnToken | None, Finish]]:
    """Yields a function that shows an answer's text as it comes, and one that shows what is left at the end.

    A single answer is streamed wherever the output goes. Several are streamed together on a terminal; elsewhere they
    are written in order, and only the first is streamed.
    """
    if as_json:
        yield None, lambda texts, extras: None
    elif len(asked) > 1 and sys.stdout.isatty():
        with _growing(asked) as shown:
            yield shown
    else:
        yield _in_order(asked)


def _in_order(asked: list[str]) -> tuple[OnToken, Finish]:
    def on_token(piece: str, n: int) -> None:
        if n == 0:
            echo(piece, nl=False)

    def finish(texts: list[str], extras: list[str]) -> None:
        echo(extras[0])
        for question, text, extra in zip(asked[1:], texts[1:], extras[1:], strict=True):
            echo(f"\n> {question}\n{text}{extra}")

    if len(asked) > 1:
        echo(f"> {asked[0]}")
    return on_token, finish


@contextmanager
def _growing(asked: list[str]) -> Iterator[tuple[OnToken, Finish]]:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    texts = [""] * len(asked)

    def rendered() -> Group:
        pairs = [(visible(f"> {q}"), visible(text.strip())) for q, text in zip(asked, texts, strict=True)]
        return Group(*(Text.assemble((q, "bold"), "\n", text, "\n") for q, text in pairs))

    with Live(get_renderable=rendered, refresh_per_second=12) as live:

        def on_token(piece: str, n: int) -> None:
            texts[n] += piece

        def finish(whole: list[str], extras: list[str]) -> None:
            texts[:] = [text.strip() + extra for text, extra in zip(whole, extras, strict=True)]
            live.vertical_overflow = "visible"

        yield on_token, finish
