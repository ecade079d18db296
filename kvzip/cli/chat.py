"""`kvzip chat`: a conversation about a file, whose states can be kept, left and folded into the context."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..display import visible_line
from ..hub import Loading
from .ask import Answering, answer_options, follow
from .compress import RATIO, SUFFIX
from .output import echo, hint, say, size, stages
from .plumbing import FileName, check_utf8, command, explain, stdin_lines
from .sources import model_options, open_cache
from .targets import check_output, is_kvzip_file, say_replaced

if TYPE_CHECKING:
    from ..cache import RaggedCache
    from ..models import Model


@dataclass
class Talk:
    """A conversation: the states of each branch, oldest first. The last state of branch `current` is the present."""

    model: "Model"
    branches: "dict[str, list[RaggedCache]]"
    current: str
    note: dict[str, Any]

    @property
    def states(self) -> "list[RaggedCache]":
        return self.branches[self.current]


@command("chat", epilog="kvzip chat contract.kvz")
@click.argument("file", type=FileName())
@answer_options
@model_options(required=False)
def chat(file: Path, answering: Answering, model: str | None, loading: Loading) -> None:
    """Talk about a compressed file.

    Each question sees those before it. /help lists the commands. Lines may also come from a pipe. The file does not
    change; /save writes another one.
    """
    with stages() as stage:
        loaded, cache, header = open_cache(stage, file, model=model, loading=loading)
    from ..cache import DenseCache, as_ragged
    from ..conversation import ask

    cache = as_ragged(cache) if isinstance(cache, DenseCache) else cache
    talk = Talk(loaded, {"1": [cache]}, "1", header.get("note", {}))
    hint(f"{header['note'].get('title') or file.name}, {cache.context_length:,} tokens: ask, or /help")
    failed = False
    for line in _lines():
        stopped = "stopped; nothing has changed"
        try:
            check_utf8(line)
            if line.startswith("/"):
                name, _, argument = line[1:].partition(" ")
                if name in ("quit", "exit"):
                    break
                if name not in COMMANDS:
                    known = ", ".join(f"/{one}" for one in (*COMMANDS, "quit"))
                    raise ValueError(f"expected one of {known}, got /{name}")
                COMMANDS[name](talk, argument.strip())
                continue
            stopped = "stopped; this turn is forgotten"
            show = partial(echo, nl=False)
            query = follow(line, chat=cache.chat)
            _, state = ask(loaded, talk.states[-1], query, template=cache.chat, on_token=show, **vars(answering))
            echo()
            talk.states.append(state)
        except (KeyboardInterrupt, click.Abort):  # Abort: Ctrl-C or Ctrl-D where a yes or a no is asked for
            echo()
            say(stopped)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            say(explain(error))
            failed = True
    if failed and not sys.stdin.isatty():  # a person has seen it, a script asks for the code
        click.get_current_context().exit(1)


def _lines() -> Iterator[str]:
    """Yields lines with something in them, from a person or a pipe, until there are no more."""
    if not sys.stdin.isatty():
        yield from filter(None, stdin_lines())
        return
    with suppress(ImportError):
        import_module("readline")  # gives input() history and editing
    leaving = False
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            echo()
            return
        except KeyboardInterrupt:
            echo()
            if leaving:
                raise
            leaving = True  # the first Ctrl-C only warns, so that no conversation is lost by a slip
            say("/quit or Ctrl-C again ends this talk, /save FILE keeps it")
            continue
        leaving = False
        if line:
            yield line


def _help(talk: Talk, argument: str) -> None:
    """list the commands"""
    for name, run in COMMANDS.items():
        echo(f"/{name:8}{run.__doc__}")
    echo("/quit    end; so does Ctrl-D")


def _stats(talk: Talk, argument: str) -> None:
    """what is held: tokens, pairs, bytes, branches"""
    from ..cache import nbytes

    state = talk.states[-1]
    said, limit = len(state.token_ids) - state.context_length, talk.model.config.max_length
    echo(f"context  {state.context_length:,} tokens, {state.kept / state.total:.1%} of {state.total:,} pairs kept")
    echo(f"turns    {said:,} tokens, whole, after the context")
    echo(f"room     {limit - len(state.token_ids):,} of {limit:,} positions")
    echo(f"memory   {size(nbytes(state))}")
    echo(f"branch   {talk.current} of {', '.join(talk.branches)}")


def _fork(talk: Talk, argument: str) -> None:
    """[NAME] go on in a new branch; the old one stays as it is"""
    free = (str(n) for n in count(len(talk.branches) + 1))
    name = argument or next(name for name in free if name not in talk.branches)
    if name in talk.branches:
        raise ValueError(f"expected the name of a new branch, got {name}: /switch {name} goes there")
    talk.branches[name] = list(talk.states)  # states never change, so branches share them
    echo(f"branch {name}, from {talk.current}")
    talk.current = name


def _switch(talk: Talk, argument: str) -> None:
    """NAME go to another branch"""
    if argument not in talk.branches:
        raise ValueError(f"expected a branch of {', '.join(talk.branches)}, got {argument or 'none'}")
    talk.current = argument
    echo(f"branch {argument}")


def _undo(talk: Talk, argument: str) -> None:
    """forget the last turn or fold"""
    if len(talk.states) == 1:
        raise ValueError("expected a turn to forget, got none")
    del talk.states[-1]
    echo("forgotten")


def _fold(talk: Talk, argument: str) -> None:
    """[RATIO] compress the turns so far into the context (0.3)"""
    from ..conversation import fold

    state = talk.states[-1]
    try:
        ratio = float(argument or RATIO)
    except ValueError:
        raise ValueError(f"expected a ratio as 0.3, got {argument}") from None
    tokens = len(state.token_ids) - state.context_length
    folded = fold(talk.model, state, ratio)
    talk.states.append(folded)
    echo(f"{tokens:,} tokens folded: {folded.kept - state.kept:,} of {folded.total - state.total:,} pairs kept")


def _save(talk: Talk, argument: str) -> None:
    """[--force] FILE write this state to a file, to ask or go on later"""
    from ..cache import save

    try:
        words = shlex.split(argument)
    except ValueError:
        raise ValueError(f"expected a file to write, got a quote that does not end: /save 'my talk{SUFFIX}'") from None
    names = [word for word in words if word != "--force"]
    if len(names) != 1 or not names[0]:
        got = "several words (a name with spaces needs quotes)" if len(names) > 1 else "none"
        raise ValueError(f"expected a file to write, got {got}: /save talk{SUFFIX}")
    force, path = "--force" in words, Path(names[0])
    how = f"/save --force {shlex.quote(names[0])}"
    held = check_output(path, kind="file of kvzip", ours=is_kvzip_file, force=force, how=how)
    save(talk.states[-1], path, note=talk.note, model=talk.model, score_bits=8, overwrite=bool(held))
    say_replaced(path, held)
    echo(f"{visible_line(str(path))}, {size(path.stat().st_size)}")


COMMANDS: dict[str, Callable[[Talk, str], None]] = {
    "stats": _stats,
    "fork": _fork,
    "switch": _switch,
    "undo": _undo,
    "fold": _fold,
    "save": _save,
    "help": _help,
}
