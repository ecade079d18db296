"""What goes to which stream, and progress.

Standard output is data; everything else goes to standard error. Whatever is written passes `visible` or
`visible_line`, is JSON in ASCII, or, in `put`, was made safe by its caller, so that no text of a document, a file or a
model can steer the terminal. Every command prints through `echo`, `say`, `hint`, `put` and `put_json` alone.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from ..display import visible, visible_line

Advance = Callable[[int, int | None], None]
"""advance(done, total) moves a line of progress."""

Stage = Callable[[str], Advance]
"""stage(what) begins a line of progress, and returns what moves it."""


def echo(text: str = "", *, nl: bool = True) -> None:
    """Writes text to standard output."""
    click.echo(visible(text), nl=nl)


def say(text: str, *, bold: bool = False) -> None:
    """Writes a line to standard error."""
    _to_stderr(text, bold=bold or None)


def hint(text: str) -> None:
    """Writes a line that only a person wants: to standard error, if that is a terminal."""
    if sys.stderr.isatty():
        _to_stderr(text, dim=True)


def _to_stderr(text: str, **style: Any) -> None:
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") in ("dumb", None)
    click.secho(visible_line(text), err=True, **({} if plain else style))


def put_json(value: Any) -> None:
    """Writes a value as JSON to standard output, in ASCII: it is JSON whatever the locale, and steers no terminal."""
    click.echo(json.dumps(value, indent=2).replace("\x7f", "\\u007f"))


def put(*renderables: Any) -> None:
    """Writes rich's tables to standard output."""
    from rich.console import Console

    console = Console(highlight=False)
    with console.capture() as shown:
        for renderable in renderables:
            console.print(renderable)
    click.echo("\n".join(line.rstrip() for line in shown.get().rstrip().splitlines()))


@contextmanager
def stages() -> Iterator[Stage]:
    """Yields a `Stage` whose progress line replaces the last one; nothing is shown where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:28}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]:>17}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bars:

        def stage(what: str) -> Advance:
            for old in bars.task_ids:
                bars.remove_task(old)
            task = bars.add_task(visible_line(what), total=None, count="")
            begun = False

            def progress(done: int, total: int | None) -> None:
                nonlocal begun
                count = f"{done:,}" if total is None else f"{done:,} of {total:,}"
                if not begun:  # a run that goes on begins its speed here, not with what was done before
                    bars.reset(task, total=total, completed=done, count=count)
                    begun = True
                bars.update(task, completed=done, total=total, count=count)

            return progress

        yield stage


def size(count: int | float) -> str:
    """Returns bytes for people: 1234567 is 1.2 MB."""
    units = iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while abs(count) >= 999.5 and unit != "TB":
        count, unit = count / 1000, next(units)
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
