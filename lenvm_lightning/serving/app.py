"""The HTTP side: routes, keys, limits and errors, all of them in the words of the OpenAI protocol."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.sse import format_sse_event
from fastapi.staticfiles import StaticFiles
from openai.types import Model
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import LenVMError, named
from ..rollouts.generators.interface import Prompt
from .answers import Answer, Answers, Wanted
from .engine_loop import Job, QueueFullError, WrittenToken
from .metrics import ServerMetrics
from .requests import ChatRequest, CompletionRequest, GenerationRequest, LengthsRequest
from .service import Service

_log = logging.getLogger(__name__)
_BODY = 32 * 2**20  # bytes: images are in it
_BODIES = 2**30  # bytes: of all requests that are being answered
_BODY_SECONDS = 60.0  # for all of a body to come
_RETRY_AFTER = 1  # seconds
_PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {"Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"}
# Without a key: what a load balancer asks, and the playground, whose files everybody has and which asks for the key.
_OPEN = ("/health", "/", *(f"/page/{file}" for file in ("page.js", "style.css")))


class CompletionFailedError(LenVMError):
    """The engine could not write a completion."""


def build_app(service: Service, api_key: str | None = None) -> FastAPI:
    """The application of one service.

    Args:
        service: entered already; whoever runs the server leaves it.
        api_key: that every request must carry as ``Authorization: Bearer KEY``; None asks for none.
    """
    app = FastAPI(title="lenvm", max_body_size=_BODY, docs_url=None, redoc_url=None)
    metrics = ServerMetrics(service.engine_loop)
    app.add_middleware(_Gate, api_key=api_key, metrics=metrics)
    name = service.generator.name

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _error(400, "; ".join(map(_told, error.errors()[:5])))

    @app.exception_handler(ValueError)
    async def refused(request: Request, error: ValueError) -> JSONResponse:
        return _error(400, str(error))

    @app.exception_handler(QueueFullError)
    async def full(request: Request, error: QueueFullError) -> JSONResponse:
        return _full(str(error))

    @app.exception_handler(LenVMError)
    async def failed(request: Request, error: LenVMError) -> JSONResponse:
        return _error(503, str(error), "server_error")

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_PAGE / "index.html", headers=_PAGE_HEADERS)

    app.mount("/page", StaticFiles(directory=_PAGE))

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = Model(id=name, created=0, object="model", owned_by="lenvm")
        return {"object": "list", "data": [model.model_dump()]}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        _require_model(body, name)
        wanted = Wanted(True, bool(body.logprobs), body.top_logprobs or 0, **_also(body))
        _require_whole(body, wanted)
        prompt = await service.prepared(service.chat, body.messages)
        if prompt.images and wanted.likeliest:
            raise ValueError("top_logprobs: images are not read back; leave it out")
        jobs = await service.prepare(body, [prompt], body.most_tokens)
        service.begin(jobs)
        return await _answer(service, metrics, request, body, Answers(jobs, service.tokenizer, name, wanted), jobs)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        _require_model(body, name)
        nothing = body.max_tokens == 0
        if nothing and not body.echo:
            raise ValueError("max_tokens: at least 1, or 0 with echo")
        wanted = Wanted(False, body.logprobs is not None, body.logprobs or 0, bool(body.echo), **_also(body))
        _require_whole(body, wanted)
        service.require_few(len(body.prompts) * (body.n or 1))
        tokenizer = service.tokenizer
        prompts: list[Prompt | list[int]] = [
            one if isinstance(one, list) else await service.prepared(lambda text: tokenizer(text)["input_ids"], one)
            for one in body.prompts
        ]
        jobs = await service.prepare(body, prompts, 1 if nothing else body.most_tokens)
        texts = [one if isinstance(one, str) else tokenizer.decode(one) for one in body.prompts] if body.echo else ()
        answers = Answers(jobs, tokenizer, name, wanted, texts)
        if nothing:
            return await _unless_left(request, _whole(service, answers))
        service.begin(jobs)
        return await _answer(service, metrics, request, body, answers, jobs)

    @app.post("/v1/lengths")
    async def lengths(body: LengthsRequest, request: Request) -> Response:
        if body.messages is not None:
            prompts = [await service.prepared(service.chat, body.messages)]
        else:
            prompts = [Prompt(str(k), [{"role": "user", "content": text}]) for k, text in enumerate(body.prompts or ())]
        service.require_few(len(prompts))

        async def told() -> dict[str, Any]:
            return {"object": "list", "model": name, "data": await service.lengths(prompts, body.completion)}

        return await _unless_left(request, told())

    return app


class _Gate:
    """Asks for the key, bounds what bodies take, counts answers, and answers where something breaks.

    Plain ASGI, so that streams and clients that leave pass untouched.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, metrics: ServerMetrics) -> None:
        self._app, self._metrics = app, metrics
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()
        self._bytes = 0  # of the bodies of requests that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        begun = False

        async def counted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                endpoint = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(endpoint, message["status"]).inc()
            await send(message)

        size = _announced(scope)
        if not self._may_pass(scope):
            refusal = _error(401, "this server asks for a key: Authorization: Bearer KEY", "authentication_error")
            await refusal(scope, receive, counted)
            return
        if self._bytes and self._bytes + size > _BODIES:
            await _full("the bodies of other requests fill the memory")(scope, receive, counted)
            return
        self._bytes += size
        try:
            await self._app(scope, _in_time(receive), counted)
        except Exception as error:  # a bug of ours: told, counted, and written down for whoever runs the server
            _log.exception("a request ended in an error that nobody expected")
            if not begun:
                await _error(500, f"the server failed: {named(error)}", "server_error")(scope, receive, counted)
        finally:
            self._bytes -= size

    def _may_pass(self, scope: Scope) -> bool:
        if self._expected is None or scope["path"] in _OPEN:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, self._expected)


def _require_model(body: GenerationRequest, name: str) -> None:
    if body.model is not None and body.model != name:
        raise HTTPException(404, f"there is no model {body.model!r} here; this server has {name!r}")


def _also(body: GenerationRequest) -> dict[str, bool]:
    return {"token_ids": bool(body.return_token_ids), "stop_text": bool(body.include_stop_str_in_output)}


def _require_whole(body: GenerationRequest, wanted: Wanted) -> None:
    if body.stream and (wanted.logprobs or wanted.echo):
        raise ValueError("logprobs and echo come with whole answers only: leave out stream, or them")


async def _answer(
    service: Service,
    metrics: ServerMetrics,
    request: Request,
    body: GenerationRequest,
    answers: Answers,
    jobs: list[Job],
) -> Response:
    """The response to a request whose jobs are under way."""
    tokens = _tokens(jobs, answers, metrics)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(_pieces(service, jobs, answers, tokens, usage), media_type="text/event-stream")

    async def read_all() -> dict[str, Any]:
        async for _ in tokens:
            pass
        return await _whole(service, answers)

    try:
        return await _unless_left(request, read_all())
    finally:
        service.cancel(jobs)  # those that have ended do not mind


async def _unless_left(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
    """The answer that comes of some work, which is given up when the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(working.result())
    finally:
        for task in (working, leaving):
            task.cancel()


async def _whole(service: Service, answers: Answers) -> dict[str, Any]:
    if answers.wanted.from_reading:
        await service.read_back(answers.all, answers.wanted.likeliest)
    return answers.whole()


async def _left(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _tokens(
    jobs: list[Job], answers: Answers, metrics: ServerMetrics
) -> AsyncGenerator[tuple[Answer, str], None]:
    """Completions, each with what a token has added to its text, until all have ended.

    Raises:
        ValueError: a model cannot read the prompt.
        CompletionFailedError: one of them failed.
    """
    began, first = time.monotonic(), True
    merged: asyncio.Queue[tuple[Answer, WrittenToken]] = asyncio.Queue()

    async def forward(job: Job, of_job: list[Answer]) -> None:
        left = len(of_job)
        while left:
            token = await job.tokens.get()
            left -= token.finish_reason is not None
            merged.put_nowait((of_job[token.index], token))

    readers = [asyncio.ensure_future(forward(*pair)) for pair in zip(jobs, answers.by_job, strict=True)]
    by_itself = jobs[0].control is None and not jobs[0].params.stop
    try:
        left = len(answers.all)
        while left:
            answer, token = await merged.get()
            if first:
                metrics.first_token.observe(time.monotonic() - began)
                first = False
            if token.unread:
                raise ValueError(token.error)
            if token.finish_reason == "error":
                raise CompletionFailedError(token.error or "it could not be written")
            shown = answer.take(token)
            if token.finish_reason is not None:
                left -= 1
                comparable = by_itself and token.finish_reason == "stop"
                metrics.ended(len(answer.token_ids), answer.expected, comparable)
            yield answer, shown
    finally:
        for reader in readers:
            reader.cancel()


async def _pieces(
    service: Service,
    jobs: list[Job],
    answers: Answers,
    tokens: "AsyncGenerator[tuple[Answer, str], None]",
    usage: bool,
) -> AsyncIterator[bytes]:
    """Server-sent events of a streamed answer; closed by a client that leaves, it frees the rows."""
    try:
        for piece in answers.opening():
            yield _event(piece)
        async for answer, shown in tokens:
            found = answers.piece(answer, shown)
            if found is not None:
                yield _event(found)
        if usage:
            yield _event(answers.closing())
    except (LenVMError, ValueError) as error:  # the status is sent already
        yield _event(json.loads(bytes(_error(503, str(error), "server_error").body)))
    finally:
        service.cancel(jobs)
        await tokens.aclose()
    yield format_sse_event(data_str="[DONE]")


def _event(piece: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=json.dumps(piece, ensure_ascii=False))


def _error(status: int, message: str, kind: str = "invalid_request_error") -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)


def _full(message: str) -> JSONResponse:
    answer = _error(429, f"{message}. Ask again in a moment.", "rate_limit_error")
    answer.headers["Retry-After"] = str(_RETRY_AFTER)
    return answer


def _in_time(receive: Receive) -> Receive:
    """A body that has come within its time; a client that sends it slower has left, for it keeps room from others."""
    until, whole = time.monotonic() + _BODY_SECONDS, False

    async def received() -> Message:
        nonlocal whole
        if whole:
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
        except TimeoutError:
            return {"type": "http.disconnect"}
        whole = message["type"] == "http.request" and not message.get("more_body", False)
        return message

    return received


def _announced(scope: Scope) -> int:
    """Bytes of a body at most: what the client says, or what any may have."""
    said = dict(scope["headers"]).get(b"content-length", b"")
    if said.isdigit():
        return min(int(said), _BODY)
    return _BODY if b"transfer-encoding" in dict(scope["headers"]) else 0


def _told(error: Any) -> str:
    """One problem of a body: where it is, and what it is."""
    place = ".".join(str(part) for part in error["loc"] if part != "body")
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
