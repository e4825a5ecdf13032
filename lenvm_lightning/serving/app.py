"""The HTTP side: routes, in the words of the OpenAI protocol."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from openai.types import Model
from starlette.exceptions import HTTPException

from ..rollouts.generators.interface import Prompt
from .answers import Answers, Wanted
from .errors import answer_errors
from .gate import MOST_BODY, Gate
from .metrics import ServerMetrics
from .requests import ChatRequest, CompletionRequest, GenerationRequest, LengthsRequest
from .responses import answer, unless_left, whole_answer
from .service import Service

_PAGE = Path(__file__).parent / "page"
_PAGE_HEADERS = {"Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"}


def build_app(service: Service, api_key: str | None = None) -> FastAPI:
    """The application of one service.

    Args:
        service: entered already; whoever runs the server leaves it.
        api_key: that every request must carry as ``Authorization: Bearer KEY``; None asks for none.
    """
    app = FastAPI(title="lenvm", max_body_size=MOST_BODY, docs_url=None, redoc_url=None)
    metrics = ServerMetrics(service.engine_loop)
    answer_errors(app)
    app.add_middleware(Gate, api_key=api_key, metrics=metrics)
    name = service.generator.name

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
        return await answer(service, metrics, request, body, Answers(jobs, service.tokenizer, name, wanted), jobs)

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
            return await unless_left(request, whole_answer(service, answers))
        service.begin(jobs)
        return await answer(service, metrics, request, body, answers, jobs)

    @app.post("/v1/lengths")
    async def lengths(body: LengthsRequest, request: Request) -> Response:
        if body.messages is not None:
            prompts = [await service.prepared(service.chat, body.messages)]
        else:
            prompts = [Prompt(str(k), [{"role": "user", "content": text}]) for k, text in enumerate(body.prompts or ())]
        service.require_few(len(prompts))

        async def told() -> dict[str, Any]:
            return {
                "object": "list",
                "model": name,
                "data": await service.lengths(prompts, body.completion, body.quantiles),
            }

        return await unless_left(request, told())

    return app


def _require_model(body: GenerationRequest, name: str) -> None:
    if body.model is not None and body.model != name:
        raise HTTPException(404, f"there is no model {body.model!r} here; this server has {name!r}")


def _also(body: GenerationRequest) -> dict[str, bool]:
    return {"token_ids": bool(body.return_token_ids), "stop_text": bool(body.include_stop_str_in_output)}


def _require_whole(body: GenerationRequest, wanted: Wanted) -> None:
    if body.stream and (wanted.logprobs or wanted.echo):
        raise ValueError("logprobs and echo come with whole answers only: leave out stream, or them")
