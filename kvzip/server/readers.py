"""Readers of a server: many streams at once. A program of its own, which takes none of the server's time.

    python kvzip/server/readers.py < request.json

Nothing of kvzip or torch is imported, so it begins at once.
"""

import asyncio
import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit


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
