"""Errors in the words of the OpenAI protocol."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import LenVMError
from .engine_loop import QueueFullError

_RETRY_AFTER = 1  # seconds


def answer_errors(app: FastAPI) -> None:
    """Let an application answer what its routes raise, each kind with a status of its own."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_body(400, "; ".join(map(_told, error.errors()[:5])))

    @app.exception_handler(ValueError)
    async def refused(request: Request, error: ValueError) -> JSONResponse:
        return error_body(400, str(error))

    @app.exception_handler(QueueFullError)
    async def full(request: Request, error: QueueFullError) -> JSONResponse:
        return full_body(str(error))

    @app.exception_handler(LenVMError)
    async def failed(request: Request, error: LenVMError) -> JSONResponse:
        return error_body(503, str(error), "server_error")

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        return error_body(error.status_code, str(error.detail))


def error_body(status: int, message: str, kind: str = "invalid_request_error") -> JSONResponse:
    """The answer that says what was wrong."""
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


def full_body(message: str) -> JSONResponse:
    """The answer that asks a client to come again."""
    answer = error_body(429, f"{message}. Ask again in a moment.", "rate_limit_error")
    answer.headers["Retry-After"] = str(_RETRY_AFTER)
    return answer


def _told(error: Any) -> str:
    """One problem of a body: where it is, and what it is."""
    place = ".".join(str(part) for part in error["loc"] if part != "body")
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
