"""What the tests of the server share: a server in this process, on a free port."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

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


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with three documents, one of them in 8 bits."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name)
    import jaxtyping

    import kvzip
    import random_model

    directory = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        model = replace(random_model.make(random_model.config()), stop_ids=())
        caches = {}
        for name, text in TEXTS.items():
            dense = kvzip.score(model, kvzip.prefill(model, text))
            caches[name] = kvzip.compress(dense, 0.4, bits=8 if name == "whale" else None)
            kvzip.save(caches[name], directory / f"{name}.kvz", model=model)
        files = [directory / f"{name}.kvz" for name in TEXTS]
        with serving(model, directory / "posted", files, caches=caches) as running:
            yield running


@pytest.fixture
def client(server: Running) -> Any:
    """The official client."""
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made
