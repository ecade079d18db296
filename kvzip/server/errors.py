"""Errors as OpenAI's clients read them."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException  # fastapi's, and those of the parts that it is made of

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error with its status, and the field of the request that it is about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Returns the JSON of an error."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def install(app: FastAPI) -> None:
    """Makes an app answer all errors in this form."""

    async def of_ours(request: Request, error: Any) -> JSONResponse:
        body = error_body(error.status, error.message, param=error.param, code=error.code)
        return JSONResponse(body, error.status)

    async def of_http(request: Request, error: Any) -> JSONResponse:
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, headers=error.headers)

    async def of_validation(request: Request, error: Any) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        if first["type"] == "json_invalid":
            message = f"expected a body in JSON, got one that is wrong at character {where}: {first['ctx']['error']}"
            return JSONResponse(error_body(400, message), 400)
        message = f"expected a request as /openapi.json describes it, got {where or 'a body'}: {first['msg']}"
        return JSONResponse(error_body(400, message, param=where or None), 400)

    async def of_anything(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, f"unexpected {type(error).__name__}"), 500)

    app.add_exception_handler(ApiError, of_ours)
    app.add_exception_handler(RequestValidationError, of_validation)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(404, of_http)
    app.add_exception_handler(405, of_http)
    app.add_exception_handler(Exception, of_anything)
