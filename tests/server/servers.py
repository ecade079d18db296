"""A server in this process, on a free port, and the texts of its documents."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXTS = {
    "light": "The lighthouse at Cape Rouen was built in 1871. Its keeper counted 312 steps. " * 2,
    "whale": "Call me Ishmael. Some years ago, never mind how long precisely, I went to sea. " * 2,
    "times": "It was the best of times, it was the worst of times, it was the age of wisdom. " * 2,
}


@dataclass(frozen=True)
class Running:
    """A server, its parts, and the caches of its documents."""

    url: str
    app: Any
    service: Any
    model: Any
    caches: dict[str, Any]


@contextlib.contextmanager
def serving(model: Any, directory: Path, files: list[Path], *, caches: Any = None, **options: Any) -> Iterator[Running]:
    """A server in a thread."""
    import uvicorn

    import kvzip
    from kvzip.server.app import create_app
    from kvzip.server.chat import Service
    from kvzip.server.library import Library
    from kvzip.server.metrics import Metrics

    engine = kvzip.Engine(model)
    service = Service(engine, Library(engine, directory, files), Metrics(), "tiny", 16)
    app = create_app(service, **options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=3))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", app, service, model, caches or {})
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
