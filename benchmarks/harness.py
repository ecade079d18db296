"""What the benchmarks share: the machine's facts, times, lines of results, and generated parts of written pages."""

import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

from kvzip import Decoder, machine  # noqa: E402
from kvzip.evals.results import append  # noqa: E402

RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"

Variant = list[Callable[[], object]]
"""The same call over several inputs, to be rotated."""


def facts(device: str, commit: str | None) -> dict[str, str | int | None]:
    """Returns what a figure depends on besides its inputs; exits where no commit is given and git cannot be asked."""
    commit = commit or machine.commit()
    if not commit:
        sys.exit("expected a git checkout to read the commit from: pass --commit")
    name, versions = machine.device_name(torch.device(device)), machine.versions()
    when = {"torch": versions["torch"], "commit": commit, "date": machine.now()}
    if torch.device(device).type != "cuda":
        return {"cpu": name, "threads": torch.get_num_threads(), **when}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return {"gpu": name, "driver": driver, "triton": versions["triton"], **when}


def test_or_exit(*arguments: str, workers: int = 1) -> None:
    """Runs tests, and exits if one fails, so that nothing wrong is timed."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *arguments]
    environment = dict(os.environ)
    if workers > 1:  # references would take all cores in each
        command += ["-n", str(workers)]
        environment["OMP_NUM_THREADS"] = "1"
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0:
        sys.exit("the tests above failed: nothing is timed on red")


def record(results: Path, lines: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], *, show: bool = True) -> None:
    """Prints lines and adds them to the results, with the machine's facts."""
    if show:
        for line in lines:
            print(json.dumps(line), flush=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    append(results, [{**line, **facts} for line in lines])


def read_lines(results: Path) -> list[dict[str, Any]]:
    """Returns the lines of results; `line` of each is its number."""
    text = results.read_text(encoding="utf-8")
    return [{**json.loads(line), "line": number} for number, line in enumerate(text.splitlines(), start=1)]


def in_turns(calls: Mapping[str, Callable[[], float]], rounds: int, *, warm: int = 0) -> dict[str, list[float]]:
    """Returns what each call returns in each round, the calls taking turns; the first `warm` rounds are not counted."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + warm):
        for name, call in calls.items():
            value = call()
            if index >= warm:
                found[name].append(value)
    return found


def time_variants(variants: dict[str, Variant], *, rounds: int = 30, budget_ms: float = 1500) -> dict[str, dict]:
    """Returns the median, 10th and 90th percentile in microseconds of a call of each variant on the GPU.

    Variants take turns in every round, each from a CUDA graph if it can be captured. The L2 is cold for a variant whose
    calls rotate over more input than it holds.
    """
    ready = {}
    for name, calls in variants.items():
        try:
            ready[name] = (*_capture(calls), len(calls))
        except Exception as error:  # an alternative that cannot run here is left out, and said so
            if name == "kvzip":
                raise
            print(f"  {name}: not timed: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
    times: dict[str, list[float]] = {name: [] for name in ready}
    spent = dict.fromkeys(ready, 0.0)
    for index in range(rounds + 3):
        for name, (run, _, count) in ready.items():
            if spent[name] > budget_ms and len(times[name]) >= 3:
                continue
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(200_000)  # the host gets ahead, so that launches of an eager variant can overlap
            start.record()
            run()
            stop.record()
            stop.synchronize()
            spent[name] += start.elapsed_time(stop)
            if index >= 3 or spent[name] > budget_ms:
                times[name].append(start.elapsed_time(stop) * 1000 / count)
    figures = {}
    for name, (_, mode, _) in ready.items():
        tenths = statistics.quantiles(times[name], n=10, method="inclusive")
        figures[name] = {
            "median_us": round(statistics.median(times[name]), 2),
            "p10_us": round(tenths[0], 2),
            "p90_us": round(tenths[-1], 2),
            "runs": len(times[name]),
            "mode": mode,
        }
    return figures


def step_times(decoder: Decoder, questions: Sequence[Sequence[int]], steps: int) -> list[float]:
    """Milliseconds of each of `steps` decoding steps after eight, by events around them."""
    decoder.read(questions)
    for _ in range(8):
        decoder.step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        decoder.step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def take_place(number: int, workers: int) -> None:
    """Gives worker `number` of so many its GPU, in turn, and its part of the memory; where there are none, nothing.

    At this limit torch frees what graphs of earlier caches held, and tries again.
    """
    devices = torch.cuda.device_count()
    if devices:
        torch.cuda.set_device(number % devices)
        torch.cuda.set_per_process_memory_fraction(0.95 / -(-workers // devices))


def release() -> None:
    """Frees the GPU memory of deleted tensors."""
    gc.collect()
    torch.cuda.empty_cache()


def between(text: str, start: str, stop: str, new: str) -> str:
    """Returns the text with what is between two marks replaced. Raises ValueError where they are missing."""
    head, _, rest = text.partition(start)
    _, found, tail = rest.partition(stop)
    if not found:
        raise ValueError(f"expected {start} and {stop}, got a page without them: tables go between them")
    return f"{head}{start}\n{new}\n{stop}{tail}"


def write_between(page: Path, name: str, new: str) -> None:
    """Puts a generated part between the marks `<!-- name:start -->` and `<!-- name:end -->` of a page."""
    text = page.read_text(encoding="utf-8")
    page.write_text(between(text, f"<!-- {name}:start -->", f"<!-- {name}:end -->", new), encoding="utf-8")
    print(f"wrote {name} of {page}")


def _capture(calls: Variant) -> tuple[Callable[[], None], str]:
    """A function that makes all calls once: the replay of a CUDA graph if they can be captured."""

    def eager() -> None:
        for call in calls:
            call()

    eager()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            eager()
    except RuntimeError:  # it waits for the device
        torch.cuda.synchronize()
        return eager, "eager"
    return graph.replay, "graph"
