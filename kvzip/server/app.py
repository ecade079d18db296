"""The routes of `kvzip serve`."""

import asyncio
import hmac
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from ..serving import Handle
from ..version import VERSION
from . import chat, errors
from .chat import Service
from .errors import ApiError, error_body
from .schemas import (
    ChatRequest,
    ChatResponse,
    Deleted,
    Document,
    DocumentList,
    DocumentRequest,
    ErrorResponse,
    ModelEntry,
    ModelList,
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_FAILS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 403, 404, 405, 409, 413, 429, 500, 503, 507)
}
_DELETIONS = 4  # that wait for answers at a time, on threads of their own: other requests need theirs
_OPEN = ("/health",)  # what needs no key
_QUERY = {
    "title": {"type": "string", "maxLength": 300},
    "ratio": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": 0.3},
    "bits": {"type": "string", "pattern": r"^[842](\s*,\s*[842])?$"},
    "refit": {"type": "boolean", "default": False},
    "system": {"type": "string"},
    "instruction": {"type": "string"},
}
"""Options of a document whose text is the body itself."""


def create_app(
    service: Service, *, key: str | None = None, largest: int = 20_000_000, hosts: Collection[str] | None = None
) -> FastAPI:
    """Returns the app. It closes the engine and the library of `service` when it ends.

    Args:
        key: that requests must carry as `Authorization: Bearer KEY`; None: none.
        largest: bytes of a request's body.
        hosts: names that requests may call the server by; None: any. A web page that a browser shows could otherwise
            ask a server on the same machine under a name of its own.
    """
    started, deletions = int(time.time()), ThreadPoolExecutor(_DELETIONS, thread_name_prefix="kvzip-deletions")

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.library.close)
        await run_in_threadpool(service.engine.close, cancel=True)
        deletions.shutdown(cancel_futures=True)

    app = FastAPI(title="kvzip", version=VERSION, lifespan=life, responses=_FAILS, redirect_slashes=False)
    app.add_middleware(_Guard, key=key, largest=largest, hosts=hosts)
    errors.install(app)

    @app.get("/health")
    def health() -> dict[str, str]:
        """Whether the engine runs."""
        try:
            service.engine.check_open()
        except RuntimeError as error:
            raise ApiError(503, str(error)) from error
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> str:
        """Counts in Prometheus' text form."""
        return service.metrics.text(service.engine, service.library.all())

    @app.get("/v1/models")
    def models() -> ModelList:
        """The model, and it with each document that is ready."""
        ready = [document for document in service.library.all() if document.status == "ready"]
        named = [ModelEntry(id=f"{service.name}:{document.id}", created=document.created) for document in ready]
        return ModelList(data=[ModelEntry(id=service.name, created=started), *named])

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> ModelEntry:
        """One of the names of `/v1/models`."""
        for entry in models().data:
            if entry.id == name:
                return entry
        raise ApiError(404, f"expected a name of /v1/models, got {name!r}", code="model_not_found")

    stream_too: dict[int | str, dict[str, Any]] = {
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
    }

    @app.post("/v1/chat/completions", response_model=ChatResponse, responses=stream_too)
    async def completions(asked: ChatRequest, http: Request) -> Any:
        """Answers a question, about a document if `model` or `document` names one."""
        if not asked.stream:
            return await chat.whole(service, asked, http)
        handle = await chat.begin(service, asked)
        return _Events(chat.streamed(service, asked, handle), handle)

    @app.get("/v1/documents")
    def documents() -> DocumentList:
        """All documents."""
        return DocumentList(data=service.library.all())

    described = {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": DocumentRequest.model_json_schema()},
                "text/plain": {"schema": {"type": "string", "minLength": 1}},
            },
        },
        "parameters": [{"name": name, "in": "query", "schema": schema} for name, schema in _QUERY.items()],
    }

    @app.post("/v1/documents", status_code=202, openapi_extra=described)
    async def post(http: Request) -> Document:
        """Takes a document to compress: as JSON, or as a text whose options are in the query."""
        try:
            body = await http.body()
        except ClientDisconnect as error:
            raise ApiError(499, "expected the whole document, got a client that hung up") from error
        request = _document_of(body, http)
        try:
            return await run_in_threadpool(service.library.post, request)
        except OSError as error:
            raise ApiError(507, f"expected room for the document, got {error.strerror or error}") from error

    @app.get("/v1/documents/{name}")
    def document(name: str) -> Document:
        """A document, and how far it is compressed."""
        found = service.library.get(name)
        if found is None:
            raise ApiError(404, f"expected a document of /v1/documents, got {name!r}")
        return found

    @app.delete("/v1/documents/{name}")
    async def delete(name: str) -> Deleted:
        """Takes a document out, once its requests are answered. Its file goes if it was posted."""
        if not await asyncio.get_running_loop().run_in_executor(deletions, service.library.delete, name):
            raise ApiError(404, f"expected a document of /v1/documents, got {name!r}")
        return Deleted(id=name)

    return app


class _Events(StreamingResponse):
    """A streamed answer. A client that hangs up before the first event ends the request too."""

    def __init__(self, events: AsyncIterator[str], handle: Handle) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._handle.cancel()


def _document_of(body: bytes, http: Request) -> DocumentRequest:
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            return DocumentRequest.model_validate_json(body)
        if kind not in ("text/plain", "text/markdown", "application/octet-stream"):
            told = (
                f"expected application/json or text/plain, got {kind[:80] or 'no content type'!r}: send the text of it"
            )
            raise ApiError(400, told)
        names = Counter(name for name, _ in http.query_params.multi_items())
        wrong = next((name for name, count in names.items() if count > 1 or name == "text"), None)
        if wrong is not None:
            told = f"expected options in the query, each once, and the text in the body, got {wrong[:80]!r}"
            raise ApiError(400, told, param=wrong[:80])
        return DocumentRequest.model_validate_strings({**http.query_params, "text": body.decode()})
    except UnicodeDecodeError as error:
        raise ApiError(400, f"expected text in UTF-8, got byte {error.start} that is none") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ApiError(400, f"expected a document, got {where or 'a body'}: {first['msg']}", param=where) from error


class _Guard:
    """Refuses requests without the key, of other sites' pages, and with bodies that are too large, before anything
    reads them."""

    def __init__(
        self, app: Callable[..., Awaitable[None]], *, key: str | None, largest: int, hosts: Collection[str] | None
    ) -> None:
        self.app, self.largest, self.hosts = app, largest, hosts
        self.expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"authorization", b"")
        if self.expected is not None and scope["path"] not in _OPEN and not hmac.compare_digest(given, self.expected):
            body = error_body(401, "expected the server's API key as Authorization: Bearer KEY", code="invalid_api_key")
            refusal: Response = JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})
            await refusal(scope, receive, send)
            return
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        known = self.hosts is None or re.sub(r":\d+$", "", host).lower() in self.hosts
        if not known or (origin and origin.partition("://")[2] != host):
            told = f"expected a request to this server by its own name, got {host[:80]!r} {origin[:80]!r}"
            body = error_body(403, told)
            await JSONResponse(body, 403)(scope, receive, send)
            return
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self.largest:
            await JSONResponse(error_body(413, self._too_large()), 413)(scope, receive, send)
            return
        taken = 0

        async def counted() -> MutableMapping[str, Any]:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.largest:
                raise HTTPException(413, self._too_large())
            return message

        await self.app(scope, counted, send)

    def _too_large(self) -> str:
        return f"expected a body of at most {self.largest:,} bytes, got more: compress it with kvzip compress"
