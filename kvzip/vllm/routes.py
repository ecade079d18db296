"""HTTP routes to load, list and drop documents, and what requests that name one need, whatever client sends them."""

import json
import logging
from argparse import Namespace
from typing import Any

from kvzip.vllm.settings import KEY, name_in
from kvzip.vllm.turns import FLAG, with_documents

PATH = "/v1/kvzip/documents"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
UNREAD = ("chat_template", "chat_template_kwargs", "tools", "documents")
"""Fields of a chat that its template reads, which behind a document writes the rest of a turn and nothing else."""

_log = logging.getLogger(__name__)


class Endpoints:
    """vLLM's `EndpointPlugin`; loaded where `VLLM_PLUGINS` names it."""

    name = "kvzip"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Adds the routes, and `Requests` around the app."""
        from fastapi import Request
        from fastapi.responses import JSONResponse

        async def listed(raw_request: Request) -> JSONResponse:
            return await _answer(raw_request.app, "kvzip_list")

        async def load(raw_request: Request) -> JSONResponse:
            try:
                asked = await raw_request.json()
                name, file = asked["name"], asked["file"]
            except (ValueError, KeyError, TypeError):
                return _error(400, 'expected {"name": ..., "file": ...}, got something else: name a file to load')
            return await _answer(raw_request.app, "kvzip_load", name, file)

        async def drop(name: str, raw_request: Request) -> JSONResponse:
            return await _answer(raw_request.app, "kvzip_drop", name)

        app.add_api_route(PATH, listed, methods=["GET"])
        app.add_api_route(PATH, load, methods=["POST"])
        app.add_api_route(PATH + "/{name}", drop, methods=["DELETE"])
        app.add_middleware(Requests, state=app.state)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Gives the renderer of chats the template that knows documents."""
        state.kvzip_engine = engine_client
        if engine_client is None:
            return
        for field in ("online_renderer", "openai_serving_chat"):
            holder = getattr(state, field, None)
            if holder is not None:
                source, tokens = _template(holder.chat_template, engine_client)
                if source is not None:
                    options = getattr(args, "default_chat_template_kwargs", None)
                    holder.chat_template = with_documents(source, tokens, options)


class Requests:
    """ASGI middleware: looks at requests that name a document, and passes others on as they came.

    A document that is not loaded is answered with 404, and what would be rendered wrongly behind one with 400. A chat
    gets the template's variable; neither chat nor completion gets special tokens in front of its prompt, unless a
    completion asks for them.
    """

    def __init__(self, app: Any, *, state: Any) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not _is_json(scope):
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                break
            body, more = body + message.get("body", b""), message.get("more_body", False)
        asked = _parsed(body)
        name = name_in(asked.get("vllm_xargs"))
        if name is not None:
            documents = {x["name"]: x for x in (await _call(self.state, "kvzip_list"))["answer"]}
            refused = _refusal(name, asked, documents, path)
            if refused is not None:
                await _error(*refused)(scope, receive, send)
                return
            body = json.dumps(_completed(asked, chat=path == CHAT)).encode()
            headers = [(k, v) for k, v in scope["headers"] if k.lower() != b"content-length"]
            scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        sent = False

        async def again() -> Any:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)


def _parsed(body: bytes) -> dict[str, Any]:
    """A request's object; empty for one that names no document or that vLLM will refuse."""
    if KEY.encode() not in body:
        return {}
    try:
        asked = json.loads(body)
    except ValueError:
        return {}
    return asked if isinstance(asked, dict) else {}


def _is_json(scope: Any) -> bool:
    """Whether a request has, or may have, a body in JSON."""
    kind = dict(scope["headers"]).get(b"content-type", b"application/json")
    return b"json" in kind.lower()


def _completed(asked: dict[str, Any], *, chat: bool) -> dict[str, Any]:
    if not chat:
        return {"add_special_tokens": False, **asked}
    return {**asked, "add_special_tokens": False, "chat_template_kwargs": {FLAG: True}}


def _refusal(name: str, asked: dict[str, Any], documents: dict[str, Any], path: str) -> tuple[int, str] | None:
    """The status and message of a request that cannot be answered from the document that it names."""
    if path not in (CHAT, COMPLETIONS):
        return 400, f"expected a document's question at {CHAT} or {COMPLETIONS}, got it at {path[:200]}: send it there"
    if name not in documents:
        known = ", ".join(sorted(documents)) or "none"
        return 404, f"expected a document that is loaded ({known}), got {name[:200]!r}: load it at {PATH}"
    if path != CHAT:
        return None
    if not documents[name]["chat"]:
        return 400, (
            f"expected a document with a chat prefix, got {name!r} without one: send its questions to {COMPLETIONS}"
        )
    unread = next((field for field in UNREAD if asked.get(field)), None)
    if unread is not None:
        return 400, (
            f"expected a chat behind a document without {', '.join(UNREAD)}, got {unread}: the document stands where "
            "the template would write it; leave it out (--default-chat-template-kwargs holds for all requests)"
        )
    return None


async def _call(state: Any, method: str, *args: Any) -> dict[str, Any]:
    return (await state.kvzip_engine.collective_rpc(method, args=args))[0]


async def _answer(app: Any, method: str, *args: Any) -> Any:
    from fastapi.responses import JSONResponse

    found = await _call(app.state, method, *args)
    if found["status"] != 200:
        return _error(found["status"], found["answer"])
    return JSONResponse({"documents": found["answer"]} if method == "kvzip_list" else found["answer"])


def _error(status: int, message: str) -> Any:
    """An error as OpenAI's API writes it."""
    from fastapi.responses import JSONResponse

    kind = "NotFoundError" if status == 404 else "BadRequestError" if status < 500 else "InternalServerError"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def _template(given: str | None, engine_client: Any) -> tuple[str | None, dict[str, str]]:
    """The server's chat template, or its tokenizer's, and the tokens that it names; None where there is none."""
    tokenizer = engine_client.renderer.get_tokenizer()
    source = given or getattr(tokenizer, "chat_template", None)
    if not isinstance(source, str):
        _log.warning("no chat template: documents can be asked at %s only", COMPLETIONS)
        return None, {}
    tokens = getattr(tokenizer, "special_tokens_map", {}) or {}
    return source, {name: str(value) for name, value in tokens.items() if isinstance(value, str)}


def endpoints() -> Endpoints:
    """The factory that vLLM's entry point names."""
    return Endpoints()
