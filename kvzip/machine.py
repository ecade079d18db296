"""The machine, versions and commit that a measurement depends on, and a timer that waits for the GPU."""

import datetime
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch

R = TypeVar("R")


def timed(device: torch.device, run: Callable[[], R]) -> tuple[R, float]:
    """Returns what `run` returns and the seconds that it took, work queued on the GPU included."""
    start = clock(device)
    result = run()
    return result, clock(device) - start


def clock(device: torch.device) -> float:
    """Returns the time in seconds once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    """Returns the name of a GPU, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Returns the versions of Python, torch (with its build, as +cu126) and Triton, None where that is missing."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {"python": platform.python_version(), "torch": str(torch.__version__), "triton": triton}


def now() -> str:
    """Returns the date and time in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def commit() -> str:
    """Returns the commit of the checkout with this file, "+" after it if tracked files have changed; "" outside one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        except FileNotFoundError:
            return ""

    return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
