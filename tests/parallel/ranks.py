"""Runs a function in several processes that share a model through gloo, and returns what each of them returns."""

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def start(count: int, program: str, *arguments: str, **environment: str) -> list[subprocess.Popen[str]]:
    """Starts `count` ranks of a Python program in this directory, as torchrun would, without its agent."""
    directory = tempfile.mkdtemp(prefix="kvzip-ranks-")
    paths = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]
    common = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "RANKS_AT": directory}
    ranks = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), **environment} for rank in range(count)
    ]
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / program), *arguments],
            env={**common, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in ranks
    ]


def results(count: int, program: str, given: Any, directory: Path, *, timeout_s: float = 240) -> list[Any]:
    """Returns what each rank wrote with `tell`; `given` is what it gets from `task`."""
    (directory / "given").write_bytes(pickle.dumps(given))
    running = start(count, program, str(directory))
    ended = [process.communicate(timeout=timeout_s) for process in running]
    assert [process.returncode for process in running] == [0] * count, "\n".join(x for pair in ended for x in pair)
    return [pickle.loads((directory / f"told-{rank}").read_bytes()) for rank in range(count)]


def task() -> tuple[Any, Path]:
    """In a rank: what it is given, and the directory for its files."""
    directory = Path(sys.argv[1])
    return pickle.loads((directory / "given").read_bytes()), directory


def tell(value: Any) -> None:
    """In a rank: says a value to the test."""
    (Path(sys.argv[1]) / f"told-{os.environ['RANK']}").write_bytes(pickle.dumps(value))


def join() -> Any:
    """In a rank: the group of all, which talks through files and gloo."""
    import torch.distributed as dist

    store = dist.FileStore(f"{os.environ['RANKS_AT']}/store", int(os.environ["WORLD_SIZE"]))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return dist.group.WORLD
