"""The command under torchrun: its processes share a model, and speak with one voice, that of the first."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from ..parallel import Share
    from ..parallel.launch import Launch

T = TypeVar("T")

COMMANDS = ("compress", "ask", "bench", "eval")
"""What several processes can share."""

_LAUNCH = "kvzip.launch"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def count() -> int:
    """Returns how many processes torchrun has started, 1 without it. Without torch."""
    told = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ["WORLD_SIZE"]) if told else 1


def quiet() -> None:
    """Lets the first rank alone print; an error that only another one sees is said by `fail`."""
    if count() > 1 and os.environ["RANK"] != "0":
        sys.stdout, sys.stderr = (open(os.devnull, "w", encoding="utf-8") for _ in range(2))  # noqa: SIM115


@contextmanager
def shared(ctx: click.Context, *, allowed: bool) -> Iterator[None]:
    """Within it, the ranks of torchrun are joined; without torchrun, nothing.

    Raises: UsageError for a command that only one process can run.
    """
    size = count()
    if size == 1:
        yield
        return
    if not allowed:
        raise click.UsageError(
            f"expected one process for `{ctx.command_path}`, got {size} of torchrun, which is for "
            f"{', '.join(COMMANDS[:-1])} and {COMMANDS[-1]}: start it without torchrun"
        )
    left: click.exceptions.Exit | None = None
    with ExitStack() as stack:
        for number in _SIGNALS:  # what the caller has is there again at the end
            stack.callback(signal.signal, number, signal.getsignal(number) or signal.SIG_DFL)
        with _starting():
            from ..parallel import launch

            device = launch.local_device(ctx.params.get("device"))
            ctx.meta[_LAUNCH] = stack.enter_context(launch.joined(device))
        try:
            yield
        except click.exceptions.Exit as error:  # of all ranks, which end together
            left = error
        finally:
            ctx.meta[_LAUNCH] = None
    if left is not None:
        raise left


@contextmanager
def _starting() -> Iterator[None]:
    """Within it a signal ends this process at once, and the first rank says so: an import of torch that is broken off
    cannot be gone on with, and ranks that have not joined cannot agree on who says why."""

    def end(number: int, frame: object) -> NoReturn:
        if os.environ["RANK"] == "0":
            text = "interrupted" if number == signal.SIGINT else "another rank ended, or torchrun was told to stop"
            os.write(2, f"kvzip: {text}\n".encode())
        os._exit(128 + number)

    before = {number: signal.signal(number, end) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is end:  # ranks that have joined have a handler of their own
                signal.signal(number, handler)


def launch_of(ctx: click.Context | None = None) -> "Launch | None":
    """Returns this process among those of torchrun, while a command runs in them; None in a single process."""
    return (ctx or click.get_current_context()).meta.get(_LAUNCH)


def share_of() -> "Share | None":
    """Returns with whom this process agrees on what is read and said, before there is a model."""
    joined = launch_of()
    return None if joined is None else joined.share


def agreed(share: "Share | None", decide: Callable[[], T]) -> T:
    """Returns what `decide` returns in the first process, which alone calls it; one process needs no torch for it."""
    if share is None:
        return decide()
    from ..parallel import agreed

    return agreed(share, decide)


def reason(error: BaseException) -> str:
    """Returns what an error means that came because another rank ended; "" for any other."""
    launch = sys.modules.get("kvzip.parallel.launch")
    if launch is None:
        return ""
    chain, at = [], error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    return launch.GONE if any(launch.lost(one) for one in chain) else ""


def fail(say: Callable[[], None], code: int, ctx: click.Context) -> NoReturn:
    """Ends the command with an exit code, after `say`; under torchrun all processes end, and one says why."""
    joined = launch_of(ctx)
    if joined is not None:
        joined.fail(say, code)
    say()
    ctx.exit(code)
