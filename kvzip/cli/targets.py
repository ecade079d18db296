"""Where a file may be written, and what is in one that is there already. Without torch, so that a refusal is quick."""

import errno
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..display import visible_line
from ..files import schema
from ..files.header import is_kvzip_file as is_kvzip_file
from ..files.header import peek
from ..files.writing import check_writable, is_replaceable
from .output import say, size

NAME_IT = ": name a file (-o)"


def force_option(kind: str = "file") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds --force."""
    return click.option("--force", is_flag=True, help=f"Replace a {kind} of kvzip that is there already.")


def check_output(
    path: Path,
    *,
    kind: str | None = None,
    ours: Callable[[Path], bool] = lambda path: True,
    force: bool | None = None,
    how: str = "pass --force",
) -> str:
    """Raises an error now, not after minutes of work, if a file cannot be written at `path`.

    A file that is ours is replaced only if that was asked for, by `force` or by an answer at a terminal.

    Args:
        kind: what the file is, for the error.
        ours: whether a file that is there already is one of this kind; others are never replaced.
        force: whether a file may be replaced unasked; None for a file that is written on, not replaced.
        how: what to do to replace it, for the error.

    Returns: what is in the file that will be replaced, for `say_replaced`; "" if there is none.

    Raises: OSError; ValueError for a directory, or a file that is not ours or that nobody said to replace.
    """
    if str(path) == "-":
        raise ValueError(f"expected the name of a file to write, got -: nothing is written to standard output{NAME_IT}")
    if path.is_dir():
        raise ValueError(f"expected a file to write, got the directory {path}{NAME_IT}")
    replaceable = is_replaceable(path, ours)
    if replaceable is False:
        raise ValueError(
            f"expected a new file or an older {kind or 'regular file'} to write, got {path}: it is left as it is"
        )
    check_writable(path, suffix=".partial")  # as the checkpoint of `compress --segment` ends
    if not replaceable or force is None:
        return ""
    held = _what_is_in(path)
    question = visible_line(f"{path}{held} is there already. Replace it?")
    asked = sys.stdin.isatty() and sys.stderr.isatty()  # where somebody can be asked
    if not force and not (asked and click.confirm(question, err=True)):
        raise ValueError(f"expected a name that is free, got {path}{held}: it is left as it is; {how} to replace it")
    return held


def say_replaced(path: Path, held: str) -> None:
    """Says what was in a file that has been replaced, if there was one: `held` is what `check_output` returned."""
    if held:
        say(f"replaced {path}{held}")


def _what_is_in(path: Path) -> str:
    """What a file that may be lost holds, in brackets: document, model, ratio and size, as far as it says."""
    header = peek(path)
    source, kept, total = schema.entry(header, "model").get("source"), header.get("kept"), header.get("total")
    parts = [
        str(schema.entry(header, "note").get("title") or ""),
        f"by {Path(str(source)).name}" if source else "",
        f"{kept / total:.1%} kept" if isinstance(kept, int) and isinstance(total, int) and total else "",
        size(path.stat().st_size),
    ]
    return f" ({', '.join(filter(None, parts))})"


def is_page(path: Path, *, by: str = "kvzip") -> bool:
    """Whether a file is a page that says it was made by `kvzip report`, or by "kvzip eval"."""
    with path.open("rb") as file:
        return f'<meta name="generator" content="{by}">'.encode() in file.read(1024)


def check_space(path: Path, needed: int) -> None:
    """Raises OSError if the disk of a file has no room for `needed` bytes."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"No space left on device ({size(needed)} needed, {size(free)} free)", str(path))


def unwritten(path: Path) -> str:
    """Returns what to say of a file that was to be written when Ctrl-C came."""
    return f"{path} {'is as it was' if path.exists() else 'was not written'}: run it again"
