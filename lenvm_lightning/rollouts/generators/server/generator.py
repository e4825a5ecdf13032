"""Completions from any OpenAI-compatible server: vLLM, SGLang, ``transformers serve``, llama.cpp, OpenAI, gateways."""

import asyncio
import contextlib
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import openai
from transformers import GenerationConfig

from ....decoding.sampling_params import SamplingParams, completion_seed
from ....errors import CheckpointError, GeneratorError
from ....models.backbone import load_processor, resolve
from ..interface import Answer, Failure, GeneratedText, PromptRequest
from .backends import Dialect, find_dialect
from .chat import chat_messages
from .controls import ControlFields
from .responses import Reader
from .retry_policy import Asker, Patience, judge

if TYPE_CHECKING:
    from ....guidance import Control


class ServerGenerator:
    """A model behind an address.

    Every completion is a request of its own (``n`` stays 1): each has its own seed, can be missing on its own, and
    servers that keep the prompts they have read answer the others of a prompt without reading it again.

    The key comes from the environment and goes nowhere but into the requests.

    Args:
        url: address, ``http://host:port``; ``/v1`` is added where it has no path.
        model: name that the server knows the model by; the only one it lists where None.
        processor: the model's own tokenizer (directory, Hugging Face id or embedded name), to make token ids with where
            the server returns text only; the model's name is tried where None. Servers that return ids need none.
        server: kind of server, one of ``dialects.DIALECTS``; ``auto`` asks it.
        concurrency: requests under way at once, at most 1000.
        retries: how often a completion is asked for again after 429, 5xx, time-outs, broken connections and answers.
        backoff: seconds before the first retry, doubled each time up to a minute; a server's Retry-After goes before.
        patience: seconds without any connection after which the server counts as dead.
        timeout: seconds that one answer may take.
        logprobs: ask for log-probabilities; where None, of servers that always give them.
        api_key_env: environment variable that holds the key; servers without keys need none.
        gamma: discount of the length value model of a ``research`` server, for requests with a control; where None, it
            takes 0.997.

    Attributes:
        name: the model's name, written into every record.

    Raises:
        GeneratorError: no server there, no model or no tokenizer that could be used, the key refused.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        processor: str | None = None,
        server: str = "auto",
        concurrency: int = 32,
        retries: int = 6,
        backoff: float = 0.5,
        patience: float = 60.0,
        timeout: float = 600.0,
        logprobs: bool | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        gamma: float | None = None,
    ) -> None:
        if not 1 <= concurrency <= 1000:
            raise GeneratorError(f"concurrency must lie between 1 and 1000, got {concurrency}")
        self._base_url, self._where = _addresses(url)
        self._key_env = api_key_env
        self._concurrency, self._retries, self._backoff = concurrency, retries, backoff
        self._patience, self._timeout = patience, timeout
        if model is None or server == "auto":
            self.name, self._dialect = self._look(model, server)
        else:
            self.name, self._dialect = model, find_dialect(server, "", [], set)
        if gamma is not None and not self._dialect.controls:
            raise GeneratorError(f"gamma is for servers of kind 'research'; this one is {self._dialect.name!r}")
        self._gamma = gamma
        self._logprobs = self._dialect.logprobs if logprobs is None else logprobs
        self._encode, self._eos, self._stops = self._tokenizer(processor)

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the model: not its address, which changes when the server is started again."""
        return {"kind": "server", "name": self.name}

    def check(self, control: "Control", sampling: SamplingParams) -> None:
        """Ask for nothing, but refuse a control as `sample` would.

        Raises:
            GeneratorError: the server takes no controls, or not with these settings.
            GenerationError: it has no name for this one.
        """
        ControlFields(self._dialect, sampling, self._gamma).of(control)

    def sample(self, requests: Iterable[PromptRequest], sampling: SamplingParams) -> Iterator[Answer]:
        """Yield answers as they come; see `Generator`.

        No more than twice ``concurrency`` answers are asked for beyond those taken, whatever ``requests`` holds.
        Closing the iterator, or an interrupt, abandons the requests under way.

        Raises:
            GeneratorError: the server refuses the key or every request, or cannot be reached any more; or a request has
                a control, and the server does not take it.
            GenerationError: it has no name for the control.
        """
        fields: dict[str, Any] = {
            "model": self.name,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._dialect.limit: sampling.max_tokens,
            "extra_body": self._dialect.fields(sampling, self._stops),
        }
        if self._logprobs and not (self._dialect.scaled and sampling.temperature != 1):
            fields["logprobs"] = True
        reader = Reader(sampling.max_tokens, self._encode, self._eos)

        def asker(client: openai.AsyncOpenAI) -> Asker:
            return Asker(
                client,
                fields,
                reader,
                Patience(self._patience, self._where),
                retries=self._retries,
                backoff=self._backoff,
                longest_wait=self._timeout,
                hide=self._hide,
            )

        controls = ControlFields(self._dialect, sampling, self._gamma)
        jobs = (job for request in requests for job in _jobs(request, controls))
        return _Conversation(jobs, sampling.seed, self._concurrency, self._client, asker).answers(reader.report)

    def _client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(timeout=openai.Timeout(self._timeout, connect=10.0), **self._options())

    def _options(self) -> dict[str, Any]:
        # A key has to be given, or the client takes one from another variable than was named.
        return {"base_url": self._base_url, "api_key": self._key() or "none", "max_retries": 0}

    def _key(self) -> str:
        return os.environ.get(self._key_env, "").strip()

    def _hide(self, text: str) -> str:
        """A text without the key, which servers and clients like to repeat."""
        key = self._key()
        for secret in (key, repr(key)[1:-1]):
            text = text.replace(secret, "***") if secret else text
        return text

    def _look(self, model: str | None, server: str) -> tuple[str, Dialect]:
        """Ask the server what it serves and what kind it is."""
        with openai.OpenAI(timeout=30.0, **self._options()) as client:
            try:
                listed: list[Any] | None = list(client.models.list().data or [])
            except openai.APIConnectionError as error:
                raise GeneratorError(
                    f"no server answers at {self._where} ({self._hide(judge(error).reason)}). Start it, or check the "
                    "address."
                ) from None
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise GeneratorError(
                    f"{self._where} refuses the key in ${self._key_env} ({self._hide(judge(error).reason)})"
                ) from None
            except (openai.APIError, ValueError, AttributeError):  # `transformers serve` without a cache folder: 500
                listed = None
            owners = [str(getattr(card, "owned_by", "")) for card in listed or []]
            host = urlsplit(self._base_url).hostname or ""
            dialect = find_dialect(server, host, owners, lambda: _served_paths(client))
        if model is not None:
            return model, dialect
        names = [str(card.id) for card in listed or []]
        if dialect.name == "transformers":  # its list is that of the cache folder, not of what it serves
            names = []
        if len(names) == 1:
            return names[0], dialect
        found = f"lists {len(names)}: {', '.join(names[:20])}" if names else "does not say which one it serves"
        raise GeneratorError(f"which model? {self._where} {found}. Name it: model=... (--model, --sample.model)")

    def _tokenizer(self, source: str | None) -> tuple[Callable[[str], list[int]] | None, int | None, list[int]]:
        """How to make ids of a text, the id that ends one, and all ids that end a completion."""
        if source is None and self._dialect.token_ids:
            return None, None, []
        given = source or self.name
        try:
            processor = load_processor(given)
        except CheckpointError as error:
            raise GeneratorError(
                f"a server of kind {self._dialect.name!r} returns text only, so ids are made with the model's own "
                f"tokenizer, and there is none in {given!r}: {error} Give it as processor=... (a directory or a "
                "Hugging Face id)."
            ) from error
        tokenizer = getattr(processor, "tokenizer", processor)
        eos = tokenizer.eos_token_id
        if eos is None:
            raise GeneratorError(f"the tokenizer in {given!r} has no end-of-sequence token")
        return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"]), eos, _stops(given, eos)


def _addresses(url: str) -> tuple[str, str]:
    """The address for requests, and the one for messages, without user and password."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise GeneratorError(f"{url!r} is no address of a server; one looks like http://localhost:8000")
    parts = parts._replace(path=parts.path.rstrip("/") or "/v1")
    return urlunsplit(parts), urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=""))


def _served_paths(client: openai.OpenAI) -> set[str]:
    """Paths in the description of itself that a FastAPI server gives; none where there is no such thing."""
    root = str(client.base_url).rstrip("/").removesuffix("/v1")
    try:
        # Tried again, for uvicorn hangs up after the error that the list of models may have been.
        described: Any = client.with_options(base_url=root, max_retries=2).get("/openapi.json", cast_to=object)
        return set(described["paths"])
    except (openai.APIError, ValueError, KeyError, TypeError):
        return set()


def _stops(source: str, eos: int) -> list[int]:
    """Ids that end a completion by the model's generation configuration; its tokenizer's alone where it has none."""
    try:
        ids = GenerationConfig.from_pretrained(resolve(source)).eos_token_id
    except (OSError, ValueError):
        ids = None
    return ids if isinstance(ids, list) else [eos if ids is None else ids]


_Job = tuple[str, int, list[dict[str, Any]] | Failure, dict[str, Any]]


class _Conversation:
    """Runs requests on an event loop in a thread of its own, so that callers need none and may have one.

    Requests are taken, and their pictures opened, in the caller's thread: whatever they come from need not know of
    threads.
    """

    def __init__(
        self,
        jobs: Iterator[_Job],
        seed: int,
        concurrency: int,
        client: Callable[[], openai.AsyncOpenAI],
        asker: Callable[[openai.AsyncOpenAI], Asker],
    ) -> None:
        self._jobs, self._seed, self._concurrency = jobs, seed, concurrency
        self._client, self._asker = client, asker
        self._answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._main, name="server-generator", daemon=True)

    def answers(self, report: Callable[[], None]) -> Iterator[Answer]:
        """Yield answers until all are there, then raise what went wrong, if anything."""
        self._thread.start()
        self._started.wait()
        try:
            under_way = 0
            while True:
                for job in itertools.islice(self._jobs, 2 * self._concurrency - under_way):
                    under_way += 1
                    self._call(self._todo.put_nowait, job)
                if not under_way or (answer := self._answers.get()) is None:
                    break
                under_way -= 1
                yield answer
        finally:
            self._call(lambda: self._task and self._task.cancel())
            self._thread.join()
            report()
        if self._error is not None:
            raise self._error

    def _call(self, function: Callable[..., Any], *arguments: Any) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: what went wrong is about to be raised
                self._loop.call_soon_threadsafe(function, *arguments)

    def _main(self) -> None:
        try:
            asyncio.run(self._work())
        except asyncio.CancelledError:
            pass
        except BaseExceptionGroup as group:
            self._error = group.exceptions[0]
        except BaseException as error:
            self._error = error
        finally:
            self._answers.put(None)
            self._started.set()

    async def _work(self) -> None:
        self._todo: asyncio.Queue[_Job] = asyncio.Queue()
        self._task, self._loop = asyncio.current_task(), asyncio.get_running_loop()
        self._started.set()
        async with self._client() as client, asyncio.TaskGroup() as workers:
            asker = self._asker(client)
            for _ in range(self._concurrency):
                workers.create_task(self._worker(asker))

    async def _worker(self, asker: Asker) -> None:
        while True:
            prompt_id, number, messages, extra = await self._todo.get()
            result: GeneratedText | Failure
            if isinstance(messages, Failure):
                result = messages
            else:
                result = await asker.ask(prompt_id, messages, completion_seed(self._seed, prompt_id, number), extra)
            self._answers.put(Answer(prompt_id, number, result))


def _jobs(request: PromptRequest, controls: ControlFields) -> Iterator[_Job]:
    """Completions of a request: messages that ask for them, or the reason why none can be; and fields of their own."""
    extra = controls.of(request.control)
    try:
        messages: list[dict[str, Any]] | Failure = chat_messages(request.prompt)
    except ValueError as error:
        messages = Failure(str(error), final=True)
    for number in request.numbers:
        yield request.prompt.prompt_id, number, messages, extra
