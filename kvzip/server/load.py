"""Readers of a server, for timing it: many streams at once from a process of their own, so that they take none of the
server's time.

    python -m kvzip.server.load < request.json
"""

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

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
    command = [sys.executable, "-m", __name__]
    run = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, timeout=timeout, check=False)
    if run.returncode:
        raise RuntimeError(f"expected answers of {url}, got none: {run.stderr.strip()[-500:]}")
    told = json.loads(run.stdout)
    return pace(told["begun"], told["times"], told["tokens"])


def main() -> None:
    """Asks what standard input says, and prints when what came."""
    asked = json.load(sys.stdin)
    where = urlsplit(asked["url"])

    async def all_of_them() -> list[tuple[float, list[float], int]]:
        streams = (_stream(where.hostname or "", where.port or 80, _body(model, asked)) for model in asked["models"])
        return await asyncio.gather(*streams)

    begun, times, tokens = zip(*asyncio.run(all_of_them()), strict=True)
    json.dump({"begun": begun, "times": times, "tokens": tokens}, sys.stdout)


def _body(model: str, asked: dict[str, Any]) -> bytes:
    return json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": asked["query"]}],
            "max_tokens": asked["tokens"],
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


async def _stream(host: str, port: int, body: bytes) -> tuple[float, list[float], int]:
    """When one stream was asked for, when each of its pieces came, and how many tokens they were."""
    begun, times, tokens = time.monotonic(), [], 0
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    try:
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status.decode().strip()}: {(await reader.read(4096)).decode()[-400:]}")
        async for line in reader:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
                elif chunk["choices"][0]["delta"].get("content"):
                    times.append(time.monotonic())
    finally:
        writer.close()
    if not tokens:
        raise RuntimeError("the stream ended before its answer did")
    return begun, times, tokens


if __name__ == "__main__":
    main()
