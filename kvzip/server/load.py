"""Timing of a server: its app in a thread, and many readers in a process of their own."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..serving.timing import Pace, pace

_PATIENCE_S = 20.0  # for a server to begin, and to end


@contextlib.contextmanager
def in_thread(app: Any, **options: Any) -> Iterator[str]:
    """Serves an app on a free port of this machine and yields its address; it is shut down at the end."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", **options))
    thread = threading.Thread(target=server.run, name="kvzip-http", daemon=True)
    thread.start()
    until = time.monotonic() + _PATIENCE_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > until:
            raise RuntimeError("expected a server that listens, got one that does not: see what it logged")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(_PATIENCE_S)


def pace_over_http(url: str, models: Sequence[str], query: str, *, tokens: int, timeout: float = 600.0) -> Pace:
    """Asks every one of `models` at once, streamed, and returns the pace of the answers.

    Raises: RuntimeError for a stream that ends before its answer does.
    """
    asked = {"url": url, "models": list(models), "query": query, "tokens": tokens}
    command = [sys.executable, "-I", str(Path(__file__).with_name("readers.py"))]
    run = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, timeout=timeout, check=False)
    if run.returncode:
        raise RuntimeError(f"expected answers of {url}, got none: {run.stderr.strip()[-500:]}")
    told = json.loads(run.stdout)
    return pace(told["begun"], told["times"], told["tokens"])
