"""What every command is made of: its class, the types of its options, and errors on one line.

A command ends with 0, with 1 for an error of the run, 2 for a wrong call, 130 for Ctrl-C.
"""

import errno
import io
import logging
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..display import visible, visible_line
from ..ratios import check_ratio
from . import ranks
from .output import say

positive = click.IntRange(min=1)

IN_THE_LIBRARY = {
    "load the model with RoPE scaling (rope=, and max_length=)": "pass RoPE scaling (--rope, and --max-length)",
    "pass chat_template= (jinja source) to load, or template=False for a base model": "for a base model pass --plain",
    "system or instruction with template=False": "--system or --instruction with --plain",
    "ask with template=False, or pass another one as chat_template=": "compress with --plain",
    "leave out system=, or pass another template as chat_template=": "leave out --system, or compress with --plain",
    "keep less (ratio, bits=8, 4 or 2)": "keep less (--ratio, --bits)",
    "raise budget_bytes or protect less": "raise --budget-bytes",
    "make them with this model, or load without model= if it is one of its fine-tunes": "kvzip heads make makes them",
}
"""What errors of the library advise, and what to do instead on the command line."""


class Stopped(Exception):
    """Ctrl-C, with what is left and how to go on."""


class Ratio(click.ParamType):
    """A fraction of pairs that is kept."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            ratio = float(value)
        except ValueError:
            ratio = math.nan  # which check_ratio refuses
        try:
            return check_ratio(ratio, got=str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Bits(click.ParamType):
    """Bits of keys and values: one number for both, or two with a comma between them."""

    name = "bits"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        parts = str(value).split(",")
        if len(parts) > 2 or any(part.strip() not in ("8", "4", "2") for part in parts):
            self.fail(f"expected 8, 4 or 2, or 8,4 for keys in 8 and values in 4 bits, got {value}", param, ctx)
        return int(parts[0]), int(parts[-1])


class FileName(click.Path):
    """A path. An empty one, as of a variable that is not set, would be the current directory."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("expected a name, got an empty one", param, ctx)
        return super().convert(value, param, ctx)


def finite(ctx: click.Context, option: click.Parameter, value: float | None) -> float | None:
    """A callback of options that are numbers: NaN is within every range of click's."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"expected a finite number, got {value}", ctx, option)
    return value


def in_bytes(ctx: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """A callback of options that are sizes: 24GB, 1.5 GiB."""
    if value is None:
        return None
    powers = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+) *([KMGT]?)(I?)(B?)", value.strip().upper())
    if not found or not (found[2] or found[4]):  # a bare number would be bytes, which nobody means
        raise click.BadParameter(f"expected a size as 24GB or 80GiB, got {value}", ctx, option)
    size = int(Decimal(found[1]) * (1024 if found[3] else 1000) ** powers[found[2]])
    if not 0 < size < 2**60:
        raise click.BadParameter(f"expected a size above 0 and below 2**60 bytes, got {value[:40]}", ctx, option)
    return size


class _WithExamples(click.Command):
    """A command whose epilog is examples, shown a line each; click would fill them into a paragraph."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.strip().splitlines():
                    formatter.write(f"{'':{formatter.current_indent}}{line.strip()}\n")


class Command(_WithExamples):
    """A command that reports what goes wrong on one line; --debug shows the traceback."""

    def __init__(self, *args: Any, shares: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shares = shares  # whether the processes of torchrun can share it
        self.params.append(click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."))

    def invoke(self, ctx: click.Context) -> Any:
        debug = ctx.params.pop("debug")
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:  # a closed one: reading finds the end, writing goes nowhere
                setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a locale may lack letters of an answer
        shown = logging.StreamHandler()
        shown.setFormatter(_Line("kvzip: %(message)s"))
        logging.basicConfig(level=logging.WARNING if debug else logging.ERROR, handlers=[shown])
        logging.getLogger("kvzip").setLevel(logging.WARNING)  # those of other libraries are for programmers
        with _reporting(ctx, debug), warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")  # torch's are for programmers
            with ranks.shared(ctx, allowed=self.shares), _reporting(ctx, debug):
                return super().invoke(ctx)


@contextmanager
def _reporting(ctx: click.Context, debug: bool) -> Iterator[None]:
    """Says what went wrong within on one line, and ends the command; under torchrun, all of its processes."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit):
        raise
    except (KeyboardInterrupt, click.Abort, Stopped) as stopped:
        text = f"interrupted: {stopped}" if isinstance(stopped, Stopped) else "interrupted"
        text = ranks.reason(stopped) or text
        ranks.fail(partial(say, f"kvzip: {text}"), 130, ctx)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            if ranks.launch_of(ctx) is not None:
                ranks.fail(lambda: None, 1, ctx)  # whoever reads has what it wanted: nothing is said
            raise
        text = ranks.reason(error) or explain(error)
        if not debug:
            ranks.fail(partial(say, f"kvzip: {text}"), 1, ctx)
        if ranks.launch_of(ctx) is None:
            raise
        ranks.fail(partial(say, traceback.format_exc()), 1, ctx)


command = partial(click.command, cls=Command)
"""Makes a function a command, as `click.command` does."""


class ListCommand(Command):
    """A command whose repeatable options also take several values at once: --ratio 0.1 0.3, or --ratio 0.1,0.3.

    It has no arguments, so every word up to the next option is a value.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        repeatable = {
            name for own in self.params if isinstance(own, click.Option) and own.multiple for name in own.opts
        }
        words: list[str] = []
        for word in args:
            name, equals, value = word.partition("=")
            words += [name, value] if equals and name in repeatable else [word]
        spread, option = [], ""
        for word, following in zip(words, [*words[1:], "--"], strict=True):
            if _is_option(word):
                option = word if word in repeatable else ""
                if option and _is_option(following):
                    raise click.BadOptionUsage(option, f"Option '{option}' requires an argument.", ctx)
            if not option:
                spread.append(word)
            elif word != option:
                spread += [part for value in word.split(",") if value for part in (option, value)]
        return super().parse_args(ctx, spread)


class Group(_WithExamples, click.Group):
    """A group that lists its commands in the order in which they were added."""

    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        ranks.quiet()
        try:
            return super().invoke(ctx)
        except click.ClickException as error:  # it may show the name of a file, so it is made safe
            shown = io.StringIO()
            error.show(file=shown)
            click.echo(visible(shown.getvalue()), err=True, nl=False)
            ctx.exit(error.exit_code)


class _Line(logging.Formatter):
    """What is logged, as one line that is safe to show."""

    def format(self, record: logging.LogRecord) -> str:
        return visible_line(super().format(record))


def _is_option(word: str) -> bool:
    return re.match(r"-[^\d.]", word) is not None


@contextmanager
def resuming(how: Callable[[], str]) -> Iterator[None]:
    """Turns Ctrl-C within into Stopped with what `how` then says of what is left and how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(how()) from error


def explain(error: Exception) -> str:
    """Returns an error as one line."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        remedy = {
            errno.ENOSPC: "free some space, or write elsewhere",
            errno.EACCES: "choose another place (-o)",
            errno.EROFS: "choose another place (-o)",
            errno.ENAMETOOLONG: "choose a shorter name",
        }.get(error.errno or 0)
        return f"{error.strerror}{where}" + (f": {remedy}" if remedy else "")
    text = " ".join(str(error).split())
    for advice, here in IN_THE_LIBRARY.items():
        text = text.replace(advice, here)
    if isinstance(error, MemoryError) and not text:
        return "out of memory"
    if isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError)) and text:
        return text
    return f"unexpected {type(error).__name__}: {text or 'no message'} (--debug shows where)"


def stdin_lines() -> Iterator[str]:
    """Yields the lines of standard input as they come, without what ends them.

    A line that is not UTF-8 keeps its bytes as surrogates, see `check_utf8`.
    """
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", "surrogateescape").strip()


def check_utf8(text: str) -> str:
    """Returns a text that came from a person or a pipe. Raises ValueError for one that was not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"expected text in UTF-8, got {text.encode('utf-8', 'surrogateescape')!r}") from None
    return text
