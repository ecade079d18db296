"""Times `load_cache` beside reading the file, and appends one JSON line for each figure.

    python benchmarks/load_cache.py [--directory DIR ...] [--device cuda] [--gib 1] [--commit HASH]

The cache is ragged, of Llama-3.1-8B's heads in bfloat16, its file warm in the page cache. It runs the tests of
`load_cache` first and times nothing if one fails; exits with 1 if loading takes more than 1.3 times as long as reading.
Variants take turns: "read" reads the whole file into memory that is allocated already, "read anew" into new memory, as
loading to a CPU does; "load" returns the cache, checked.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import kvzip
from benchmarks import harness
from kvzip.cache.rows import pack
from kvzip.machine import timed

RESULTS = harness.RESULTS / "load-cache.jsonl"
LAYERS, HEADS, WIDTH = 16, 8, 128
LIMIT = 1.3
ROUNDS = 9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, nargs="+", default=[Path(tempfile.gettempdir())])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the file")
    parser.add_argument("--commit", help="commit to write down, where git cannot be asked")
    options = parser.parse_args()
    facts = {"gpu": "none"} | harness.facts("cpu", options.commit) | harness.facts(options.device, options.commit)
    harness.test_or_exit("-k", "bit_for_bit", str(harness.ROOT / "tests" / "test_io.py"))
    cache, slow = ragged_cache(options.gib), False
    for directory in options.directory:
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            path = Path(scratch) / "cache.kvz"
            kvzip.save(cache, path)
            size = path.stat().st_size
            calls = variants(path, options.device)
            times = {
                name: lambda call=call: timed(torch.device(options.device), call)[1] for name, call in calls.items()
            }
            seconds = harness.in_turns(times, ROUNDS, warm=1)
        read = statistics.median(seconds["read anew" if options.device == "cpu" else "read"])
        for name, found in seconds.items():
            median = statistics.median(found)
            slow = slow or (name == "load" and median > LIMIT * read)
            line = {
                "case": f"{size / 2**30:.2f} GiB in {file_system(directory)}, {options.device}",
                "variant": name,
                "median_ms": round(median * 1e3, 2),
                "least_ms": round(min(found) * 1e3, 2),
                "most_ms": round(max(found) * 1e3, 2),
                "of_read": round(median / read, 3),
            }
            harness.record(RESULTS, [line], facts)
    return int(slow)


def ragged_cache(gib: float) -> kvzip.RaggedCache:
    """A cache of about `gib` GiB whose heads differ in length."""
    rows = int(gib * 2**30) // (LAYERS * WIDTH * 2 * 2)
    counts = [rows * head // sum(range(HEADS + 1)) for head in range(1, HEADS + 1)]
    length = counts[-1]
    k = torch.randn(HEADS, length, WIDTH).bfloat16()
    layer = pack(k, k, torch.arange(length) < torch.tensor(counts)[:, None], counts)
    return kvzip.RaggedCache(
        context=(layer,) * LAYERS,
        tail=None,
        context_length=length,
        start=0,
        chat=True,
        token_ids=torch.zeros(length, dtype=torch.long),
        fingerprint="none",
        kept=LAYERS * sum(counts),
        total=LAYERS * HEADS * length,
    )


def variants(path: Path, device: str) -> dict[str, Callable[[], object]]:
    size = path.stat().st_size
    warm = memoryview(bytearray(size))

    def read(buffer: memoryview = warm) -> None:
        with path.open("rb", buffering=0) as file:
            done = 0
            while count := file.readinto(buffer[done:]):
                done += count

    def load() -> kvzip.RaggedCache:
        cache = kvzip.load_cache(path, device=device)
        assert isinstance(cache, kvzip.RaggedCache)
        return cache

    return {"read": read, "read anew": lambda: read(torch.empty(size, dtype=torch.uint8).numpy().data), "load": load}


def file_system(directory: Path) -> str:
    command = ["stat", "--file-system", "--format=%T", str(directory)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
