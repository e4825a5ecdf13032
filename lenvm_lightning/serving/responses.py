"""Answers on the wire: whole or in pieces, given up when the client leaves."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import format_sse_event

from ..errors import LenVMError
from .answers import Answer, Answers
from .engine_loop import Job, WrittenToken
from .errors import error_body
from .metrics import ServerMetrics
from .requests import GenerationRequest
from .service import Service


class CompletionFailedError(LenVMError):
    """The engine could not write a completion."""


async def answer(
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
        return await whole_answer(service, answers)

    try:
        return await unless_left(request, read_all())
    finally:
        service.cancel(jobs)  # those that have ended do not mind


async def unless_left(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> Response:
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


async def whole_answer(service: Service, answers: Answers) -> dict[str, Any]:
    """All of an answer that has ended, read back where the request asks for what only reading tells."""
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
            completion, token = await merged.get()
            if first:
                metrics.first_token.observe(time.monotonic() - began)
                first = False
            if token.unread:
                raise ValueError(token.error)
            if token.finish_reason == "error":
                raise CompletionFailedError(token.error or "it could not be written")
            shown = completion.take(token)
            if token.finish_reason is not None:
                left -= 1
                comparable = by_itself and token.finish_reason == "stop"
                metrics.ended(len(completion.token_ids), completion.expected, comparable)
            yield completion, shown
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
        async for completion, shown in tokens:
            found = answers.piece(completion, shown)
            if found is not None:
                yield _event(found)
        if usage:
            yield _event(answers.closing())
    except (LenVMError, ValueError) as error:  # the status is sent already
        yield _event(json.loads(bytes(error_body(503, str(error), "server_error").body)))
    finally:
        service.cancel(jobs)
        await tokens.aclose()
    yield format_sse_event(data_str="[DONE]")


def _event(piece: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=json.dumps(piece, ensure_ascii=False))
