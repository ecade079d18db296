"""Ranks as forks of the test's process, which has imported everything: they start at once, and types are checked."""

import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code, negative for a signal; what it printed; what its function returned."""

    code: int
    out: str
    err: str
    value: Any


def fork(count: int, function: Callable[..., Any], *given: Any, directory: Path) -> list[int]:
    """Starts ranks that call a function, with the environment that torchrun gives. Returns their process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ids = []
    for rank in range(count):
        child = os.fork()
        if not child:
            _run(rank, count, port, directory, function, given)
        ids.append(child)
    return ids


def join(ids: list[int], directory: Path, *, timeout_s: float = 120) -> list[Ended]:
    """Waits for ranks; one that has not ended in time is killed, and ends with -9."""
    until, codes = time.monotonic() + timeout_s, dict.fromkeys(ids)
    while None in codes.values():
        for child in [child for child, code in codes.items() if code is None]:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            for child in [child for child, code in codes.items() if code is None]:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    ended = []
    for rank, code in enumerate(codes.values()):
        out, err = ((directory / f"{name}-{rank}").read_text(errors="replace") for name in ("out", "err"))
        told = directory / f"told-{rank}"
        ended.append(Ended(code or 0, out, err, pickle.loads(told.read_bytes()) if told.exists() else None))
    return ended


def results(count: int, function: Callable[..., Any], *given: Any, directory: Path) -> list[Any]:
    """Returns what each rank's function returns; `function(group, *given)` is called with the group of all."""
    ended = join(fork(count, _grouped, function, *given, directory=directory), directory)
    assert [one.code for one in ended] == [0] * count, "\n".join(one.err for one in ended)
    return [one.value for one in ended]


def _grouped(function: Callable[..., Any], *given: Any) -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    value = function(dist.group.WORLD, *given)
    dist.barrier()
    return value


def _run(
    rank: int, count: int, port: int, directory: Path, function: Callable[..., Any], given: tuple[Any, ...]
) -> None:
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(directory / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1, encoding="utf-8")  # pyright: ignore
        sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, encoding="utf-8")  # pyright: ignore
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        torch.manual_seed(rank)  # what ranks draw is not the same by itself
        value = function(*given)
        (directory / f"told-{rank}").write_bytes(pickle.dumps(value))
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
