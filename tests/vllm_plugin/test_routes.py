"""What the HTTP server does with requests before vLLM sees them."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from kvzip.vllm import routes


def sent(path: str, body: Any, *, root: str = "", kind: str = "application/json") -> tuple[int, Any]:
    """The status of a request's answer, and the body that vLLM gets or what the error says."""
    got: dict[str, Any] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        got["body"], got["length"] = (await receive())["body"], dict(scope["headers"]).get(b"content-length")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def rpc(method: str, args: Any = ()) -> list[Any]:
        listed = [{"name": "chat", "chat": True}, {"name": "plain", "chat": False}]
        return [{"status": 200, "answer": listed}]

    raw = json.dumps(body).encode()
    state = SimpleNamespace(kvzip_engine=SimpleNamespace(collective_rpc=rpc))
    scope = {"type": "http", "method": "POST", "path": path, "root_path": root}
    scope["headers"] = [(b"content-type", kind.encode()), (b"content-length", str(len(raw)).encode())]
    parts = [{"type": "http.request", "body": raw[:7], "more_body": True}, {"type": "http.request", "body": raw[7:]}]

    async def receive() -> Any:
        return parts.pop(0)

    async def send(message: Any) -> None:
        got.setdefault("status", message.get("status"))
        got["said"] = message.get("body", b"")

    asyncio.run(routes.Requests(app, state=state)(scope, receive, send))
    if got["status"] == 200:
        assert got["length"] == str(len(got["body"])).encode() or kind != "application/json"
        return 200, got["body"] if kind != "application/json" else json.loads(got["body"])
    return got["status"], json.loads(got["said"])["error"]["message"]


def test_requests_reach_vllm_with_what_a_document_needs() -> None:
    asked = {"messages": [], "vllm_xargs": {"kvzip": "chat"}}
    added = {"add_special_tokens": False, "chat_template_kwargs": {"kvzip_document": True}}
    assert sent("/v1/chat/completions", asked) == (200, asked | added)
    assert sent("/api/v1/chat/completions", asked, root="/api") == (200, asked | added)
    plain = {"messages": [], "vllm_xargs": {"other": 1}, "tools": [{}]}
    assert sent("/v1/chat/completions", plain) == (200, plain)
    asked = {"prompt": "p", "vllm_xargs": {"kvzip": "plain"}}
    assert sent("/v1/completions", asked) == (200, {**asked, "add_special_tokens": False})
    assert sent("/v1/audio", asked, kind="multipart/form-data; boundary=x")[0] == 200


@pytest.mark.parametrize(
    ("status", "said", "path", "asked"),
    [
        (404, r"is loaded \(chat, plain\), got 'b'", "/v1/completions", {"vllm_xargs": {"kvzip": "b"}}),
        (400, "got 'plain' without one", "/v1/chat/completions", {"vllm_xargs": {"kvzip": "plain"}}),
        (400, "got it at /v1/responses", "/v1/responses", {"vllm_xargs": {"kvzip": "chat"}}),
        *(
            (400, f"got {field}: ", "/v1/chat/completions", {"vllm_xargs": {"kvzip": "chat"}, field: value})
            for field, value in {
                "tools": [{}], "chat_template": "x", "chat_template_kwargs": {"a": 1}, "documents": [{}]
            }.items()
        ),
    ],
)  # fmt: skip
def test_requests_that_would_be_answered_wrongly_are_refused(status: int, said: str, path: str, asked: Any) -> None:
    found = sent(path, asked)
    assert found[0] == status
    with pytest.raises(ValueError, match=said):
        raise ValueError(found[1])
