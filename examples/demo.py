"""Compresses a document's cache to 30% and asks the same questions of the full and of the compressed cache.

    python examples/demo.py [MODEL]

MODEL is a local Hugging Face directory or a hub id; by default SmolLM2-135M-Instruct out of a registry package.
A third column keeps 30% of the pairs at random. Exits with 1 unless at least 4 of the 5 answers are right both with
the full cache and with the compressed one.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import kvzip
from museum import DEFAULT_MODEL, DOCUMENT, Question, default_dtype, is_right, load
from museum import FIVE as QUESTIONS

RATIO = 0.3
CHUNK = 512  # tokens per pass, small enough for the progress bars to move
ANSWER_TOKENS = 12
REQUIRED = 4


@dataclass(frozen=True)
class Column:
    """The answers from one cache, with what the table says about it."""

    title: str
    cache: kvzip.DenseCache | kvzip.RaggedCache
    answers: list[str]

    @property
    def right(self) -> int:
        return sum(is_right(question, answer) for question, answer in zip(QUESTIONS, self.answers, strict=True))


def main() -> int:
    """Runs the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compress the cache of a document to 30% and ask it five questions.")
    parser.add_argument("model", nargs="?", help="local Hugging Face directory or hub id (default: SmolLM2-135M)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    arguments = parser.parse_args()
    console = Console()
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        model = load(arguments.model, getattr(torch, arguments.dtype) if arguments.dtype else default_dtype())
    columns = run(model, DOCUMENT.read_text(encoding="utf-8").strip(), seconds, console)
    console.print(answer_table(columns))
    console.print("  ".join(f"{stage} {elapsed:.1f} s" for stage, elapsed in seconds.items()))
    return verdict(columns, console)


def run(model: kvzip.Model, document: str, seconds: dict[str, float], console: Console) -> list[Column]:
    """Returns the answers from the full cache, the compressed one, and one that keeps as many pairs at random."""
    with timed(seconds, "prefill"), progress_bar(console, "prefill") as progress:
        full = kvzip.prefill(model, document, chunk=CHUNK, template=False, progress=progress)
    with timed(seconds, "score"), progress_bar(console, "score") as progress:
        full = kvzip.score(model, full, chunk=CHUNK, progress=progress)
    with timed(seconds, "compress"):
        small = kvzip.compress(full, ratio=RATIO)
    caches = {
        "full cache": full,
        f"kvzip, {RATIO:.0%} kept": small,
        f"random {RATIO:.0%}": kvzip.compress(with_random_scores(full), ratio=RATIO),
    }
    openings = [f"\n\n{question.opening}" for question in QUESTIONS]  # each begins a new paragraph after the document
    columns = []
    for title, cache in caches.items():
        with timed(seconds, f"answers ({title})"):
            answers = kvzip.generate(model, cache, openings, max_tokens=ANSWER_TOKENS, template=False)
        columns.append(Column(title, cache, [answer.text for answer in answers]))
    return columns


def with_random_scores(cache: kvzip.DenseCache, seed: int = 0) -> kvzip.DenseCache:
    """Returns the cache with scores drawn at random in place of its own."""
    assert cache.scores is not None
    values = torch.rand(cache.scores.values.shape, generator=torch.Generator().manual_seed(seed))
    scores = replace(cache.scores, values=values.to(cache.scores.values.device), source="random")
    return replace(cache, scores=scores)


def answer_table(columns: list[Column]) -> Table:
    """Returns the table of questions and answers, with the size of each cache below."""
    table = Table(title=f"{DOCUMENT.name}: {columns[0].cache.total:,} pairs", show_lines=True)
    table.add_column("question")
    for column in columns:
        table.add_column(column.title)
    for row, question in enumerate(QUESTIONS):
        answers = [column.answers[row] for column in columns]
        table.add_row(f"{question.opening} ...", *(marked(question, answer) for answer in answers))
    table.add_row("right", *(f"{column.right} of {len(QUESTIONS)}" for column in columns))
    table.add_row("pairs kept", *(f"{column.cache.kept / column.cache.total:.4f}" for column in columns))
    table.add_row("cache, MB", *(f"{kvzip.nbytes(column.cache) / 1e6:.2f}" for column in columns))
    return table


def marked(question: Question, answer: str) -> str:
    """Returns the answer on one line, in rich's markup, with a mark for right or wrong in front."""
    mark = "[green]\u2713[/]" if is_right(question, answer) else "[red]\u2717[/]"
    return f"{mark} {escape(' '.join(answer.split()))}"


def verdict(columns: list[Column], console: Console) -> int:
    """Prints whether the demo succeeded; returns the exit status."""
    failed = [column for column in columns[:2] if column.right < REQUIRED]
    for column in failed:
        console.print(
            f"[red]expected at least {REQUIRED} of {len(QUESTIONS)} right answers with {column.title}, "
            f"got {column.right}: the questions are made for {DEFAULT_MODEL}, so try them on a larger model[/]"
        )
    return 1 if failed else 0


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the time that the block takes, work queued on the GPU included, to `seconds`."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds[stage] = time.perf_counter() - start


@contextmanager
def progress_bar(console: Console, stage: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar of the stage's tokens; yields the callback that moves it."""
    columns = (TextColumn(f"{stage:8}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(stage, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
