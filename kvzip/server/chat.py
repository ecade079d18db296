"""Chat completions: requests checked, submitted to the engine, and answered whole or as they grow."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from ..answers import Answer
from ..serving import Engine, Handle, Held
from .errors import ApiError, error_body
from .library import Library
from .messages import conversation_ids
from .metrics import Metrics
from .schemas import ChatRequest, ChatResponse, Choice, PromptDetails, ReplyMessage, Usage

_HANG_UP_S = 0.2  # how often a request whose answer is not streamed looks whether its client is still there
_STOPS = (16, 256)  # stop texts of a request, and characters of each, at most: they are looked for after each token


@dataclass(frozen=True)
class Service:
    """What requests are answered with. `most` is how many tokens an answer has where a request does not say."""

    engine: Engine
    library: Library
    metrics: Metrics
    name: str
    most: int


async def begin(service: Service, request: ChatRequest) -> Handle:
    """Submits a request to the engine. Raises ApiError for one that cannot be answered."""
    _check_supported(request)
    context = _context_of(service, request)
    try:
        return await run_in_threadpool(_submit, service, request, context)
    except ValueError as error:
        gone = context is not None and context.removed  # since it was looked up
        raise ApiError(404 if gone else 400, str(error)) from error
    except RuntimeError as error:  # the engine is closed, or failed
        raise ApiError(503, str(error)) from error


def _submit(service: Service, request: ChatRequest, context: Held | None) -> Handle:
    ids = conversation_ids(service.engine.model, None if context is None else context.meta, request.messages)
    handle = service.engine.submit(
        context,
        ids,
        max_tokens=request.max_completion_tokens or request.max_tokens or service.most,
        temperature=1.0 if request.temperature is None else float(request.temperature),
        top_p=1.0 if request.top_p is None else float(request.top_p),
        seed=request.seed,
        stop=request.stop or (),
        repetition_penalty=1.0 if request.repetition_penalty is None else float(request.repetition_penalty),
    )
    service.metrics.add("kvzip_question_tokens_total", handle.question_tokens)
    service.metrics.add("kvzip_document_tokens_total", handle.context_tokens)
    return handle


async def whole(service: Service, request: ChatRequest, http: Request) -> ChatResponse:
    """Returns the whole answer to a request. A client that hangs up ends it."""
    handle = await begin(service, request)
    collecting = asyncio.ensure_future(_collected(handle))
    try:
        while not collecting.done():
            await asyncio.wait([collecting], timeout=_HANG_UP_S)
            if not collecting.done() and await http.is_disconnected():
                handle.cancel()
        answer = collecting.result()
    except CancelledError as error:
        service.metrics.add('kvzip_requests_total{outcome="cancelled"}')
        raise ApiError(499 if await http.is_disconnected() else 503, str(error)) from error
    except Exception as error:
        service.metrics.add('kvzip_requests_total{outcome="failed"}')
        raise ApiError(500, str(error)) from error
    finally:
        handle.cancel()
        collecting.cancel()
    _count(service, handle, answer)
    return ChatResponse(
        id=_new_id(),
        created=int(time.time()),
        model=request.model,
        choices=[Choice(message=ReplyMessage(content=answer.text), finish_reason=answer.stopped)],
        usage=_usage(handle, answer),
    )


async def streamed(service: Service, request: ChatRequest, handle: Handle) -> AsyncIterator[str]:
    """Yields an answer as server-sent events. Once begun it ends the request when it is closed."""
    shared = {"id": _new_id(), "object": "chat.completion.chunk", "created": int(time.time()), "model": request.model}
    asked = request.stream_options
    usage: dict[str, Any] = {"usage": None} if asked is not None and asked.include_usage else {}

    def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _event({**shared, "choices": [choice], **usage})

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for piece in handle:
            yield chunk({"content": piece})
        answer = handle.result()
        _count(service, handle, answer)
        yield chunk({}, answer.stopped)
        if usage:
            yield _event({**shared, "choices": [], "usage": _usage(handle, answer).model_dump()})
        yield "data: [DONE]\n\n"
    except CancelledError as error:
        service.metrics.add('kvzip_requests_total{outcome="cancelled"}')
        yield _event(error_body(503, str(error)))
    except (GeneratorExit, asyncio.CancelledError):
        service.metrics.add('kvzip_requests_total{outcome="cancelled"}')
        raise
    except Exception as error:
        service.metrics.add('kvzip_requests_total{outcome="failed"}')
        yield _event(error_body(500, str(error)))
    finally:
        handle.cancel()


async def _collected(handle: Handle) -> Answer:
    async for _ in handle:
        pass
    return handle.result()


def _check_supported(request: ChatRequest) -> None:
    """Raises ApiError for what would change the answer and is not done here."""
    unsupported = {
        "n": request.n not in (None, 1),
        "logprobs": bool(request.logprobs),
        "top_logprobs": bool(request.top_logprobs),
        "tools": bool(request.tools),
        "tool_choice": request.tool_choice not in (None, "none", "auto"),
        "response_format": request.response_format not in (None, {"type": "text"}),
        "frequency_penalty": bool(request.frequency_penalty),
        "presence_penalty": bool(request.presence_penalty),
        "logit_bias": bool(request.logit_bias),
    }
    for name, given in unsupported.items():
        if given:
            value = json.dumps(getattr(request, name))[:80]
            raise ApiError(400, f"expected no {name}, got {value}: this server does not support it", param=name)
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    most, longest = _STOPS
    if len(stops) > most or not all(0 < len(stop) <= longest for stop in stops):
        told = f"expected at most {most} stop texts of 1 to {longest} characters, got {len(stops)} or of other lengths"
        raise ApiError(400, told, param="stop")


def _context_of(service: Service, request: ChatRequest) -> Held | None:
    """The context that a request names, by its model or by itself."""
    base, colon, named = request.model.partition(":")
    if request.model == service.name:
        base, colon, named = request.model, "", ""
    elif request.model.startswith(f"{service.name}:"):
        base, colon, named = service.name, ":", request.model[len(service.name) + 1 :]
    if base != service.name or (colon and not named):
        raise ApiError(
            404,
            f"expected the model {service.name!r}, or {service.name}:document, got {request.model!r}: see /v1/models",
            param="model",
            code="model_not_found",
        )
    name = request.document if request.document is not None else named or None
    if named and request.document not in (None, named):
        raise ApiError(400, "expected one document, got two, in model and in document", param="document")
    if name is None:
        return None
    context = service.library.context(name)
    if context is not None:
        return context
    found = service.library.get(name)
    if found is None:
        raise ApiError(
            404, f"expected a document of /v1/documents, got {name!r}", param="model", code="model_not_found"
        )
    told = found.error or "poll /v1/documents until it is ready"
    raise ApiError(409, f"expected a document that is ready, got one that is {found.status}: {told}", param="document")


def _usage(handle: Handle, answer: Answer) -> Usage:
    prompt, completion = handle.context_tokens + handle.question_tokens, len(answer.token_ids)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptDetails(cached_tokens=handle.context_tokens),
    )


def _count(service: Service, handle: Handle, answer: Answer) -> None:
    """Counts an answer that is complete, with the times of its tokens."""
    service.metrics.add(f'kvzip_requests_total{{outcome="{answer.stopped}"}}')
    service.metrics.add("kvzip_answer_tokens_total", len(answer.token_ids))
    first, last = handle.times[0], handle.times[-1]
    spans = {
        "kvzip_first_token_seconds": (first - handle.begun, 1),
        "kvzip_token_seconds": (last - first, len(handle.times) - 1),
    }
    for name, (seconds, count) in spans.items():
        service.metrics.add(f"{name}_sum", seconds)
        service.metrics.add(f"{name}_count", count)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _new_id() -> str:
    return f"chatcmpl-{secrets.token_hex(12)}"
