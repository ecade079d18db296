"""What a process that failed said of it, without what it says as long as all is well.

    python benchmarks/failures.py LOG ...

Engines of others say thousands of lines, and an assertion on a GPU is said once for each thread.
"""

import re
import sys
from pathlib import Path

ERRORS = re.compile(
    r"(Error|Exception|Assertion|Timeout)\b|^E  |CUDA error|CUBLAS|out of memory|illegal|Segmentation|Traceback|Killed"
)
NOISE = re.compile(r"torch\.__trace|^\s*[~^]+\s*$|%\|| DEBUG |Warning: |warnings\.warn|^\s*$")
PLACES = re.compile(r"\[\d+,\d+,\d+\]|\d+:\d+:\d+|0x[0-9a-f]+")  # of threads, in time, in memory
WIDTH = 600  # characters of a line


def what_failed(said: str, *, first: int = 12, last: int = 30) -> str:
    """Returns the first lines that name an error and the last lines, of a text without noise.

    A line that differs from an earlier one in `PLACES` only is left out, and counted behind that.
    """
    kept: dict[str, str] = {}
    times: dict[str, int] = {}
    for line in said.splitlines():
        if NOISE.search(line):
            continue
        kind = PLACES.sub("0", line)
        kept.setdefault(kind, line[:WIDTH] + ("..." if len(line) > WIDTH else ""))
        times[kind] = times.get(kind, 0) + 1
    lines = [line + (f"  [{times[kind]} times]" if times[kind] > 1 else "") for kind, line in kept.items()]
    errors = [line for line in lines[:-last] if ERRORS.search(line)][:first]
    head = ["first errors:", *errors, "..."] if errors else []
    return "\n".join([*head, *lines[-last:]])


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"===== {name}\n{what_failed(Path(name).read_text(encoding='utf-8', errors='replace'))}", flush=True)
