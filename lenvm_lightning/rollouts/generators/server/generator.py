"""Completions from any OpenAI-compatible server: vLLM, SGLang, ``transformers serve``, llama.cpp, OpenAI, gateways."""

import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import openai

from ....decoding.sampling_params import SamplingParams, completion_seed
from ....errors import GeneratorError
from ..interface import Answer, Failure, GeneratedText, PromptRequest
from .backends import find_backend
from .chat import chat_messages
from .client import BYTES_PER_TOKEN, LARGEST_REPLY, Credentials, answered, open_client, read_address
from .controls import ControlFields
from .discovery import find_model
from .encoding import load_encoding
from .event_loop import EventLoopThread
from .options import require_options
from .responses import ResponseReader
from .retry_policy import Reachability, RetryPolicy
from .seeds import Seeds

if TYPE_CHECKING:
    from ....guidance import Control

_log = logging.getLogger(__name__)
_SECONDS_TO_SAY_WHO_IT_IS = 30.0


class ServerGenerator:
    """A model behind an address.

    Every completion is a request of its own (``n`` stays 1): each has its own seed, can be missing on its own, and
    servers that keep the prompts they have read answer the others of a prompt without reading it again.

    The key comes from the environment and goes nowhere but into the requests; which one goes where is told. A user and
    a password in the address go instead of it, and are written nowhere. Redirects are not followed. Nothing of a
    response is used that was not looked at.

    Args:
        url: address, ``http://host:port``; ``/v1`` is added where it has no path.
        model: name that the server knows the model by; the only one it lists where None.
        processor: the model's own tokenizer (directory, Hugging Face id or embedded name), to make token ids with where
            the server returns text only; the model's name is tried where None. Servers that return ids need none.
        server: kind of server, one of ``backends.BACKENDS``; ``auto`` asks it.
        concurrency: requests under way at once, at most 1000.
        retries: how often a completion is asked for again after 429, 5xx, time-outs, broken connections and responses.
        backoff: seconds before the first retry, doubled each time up to a minute; a server's Retry-After goes before.
        unreachable_timeout: seconds without any connection after which the server counts as dead.
        timeout: seconds that one response may take, from the request to its last byte; and that a server may ask to
            wait.
        logprobs: ask for log-probabilities; where None, of servers that always give them.
        api_key_env: environment variable that holds the key; servers without keys need none. Where it is empty no key
            is sent, nor an organisation or other headers that the client takes from the environment.
        seeds: send each completion's seed; without them nothing can be sampled a second time. They are left out from
            where a server refuses them.
        gamma: discount of the length value model of a ``research`` server, for requests with a control; where None, it
            takes 0.997.

    Attributes:
        name: the model's name, written into every record.
        tokens_written: tokens of all completions that have come; they come whole.

    Raises:
        GeneratorError: options that cannot be, no server there, no model or no tokenizer that could be used, the key
            refused.
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
        unreachable_timeout: float = 60.0,
        timeout: float = 600.0,
        logprobs: bool | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        seeds: bool = True,
        gamma: float | None = None,
    ) -> None:
        require_options(
            model=model,
            processor=processor,
            server=server,
            concurrency=concurrency,
            retries=retries,
            backoff=backoff,
            unreachable_timeout=unreachable_timeout,
            timeout=timeout,
            logprobs=logprobs,
            api_key_env=api_key_env,
            seeds=seeds,
            gamma=gamma,
        )
        self.tokens_written = 0
        self._address = read_address(url)
        self._credentials = Credentials(api_key_env, self._address.user)
        self._concurrency, self._retries, self._backoff = concurrency, retries, backoff
        self._unreachable_timeout, self._timeout, self._seeds = unreachable_timeout, timeout, seeds
        if told := self._credentials.told():
            _log.warning("%s sent to %s", told, self._address.shown)
        if model is None or server == "auto":
            self.name, self._backend = find_model(
                self._client_opener(LARGEST_REPLY, _SECONDS_TO_SAY_WHO_IT_IS),
                self._address,
                self._credentials,
                model,
                server,
            )
        else:
            self.name, self._backend = model, find_backend(server, "", [], set)
        if gamma is not None and self._backend.name != "research":
            raise GeneratorError(f"gamma is for servers of kind 'research'; this one is {self._backend.name!r}")
        self._gamma = gamma
        self._logprobs = self._backend.logprobs if logprobs is None else logprobs
        needed = processor is not None or not self._backend.token_ids
        self._encoding = load_encoding(processor or self.name, self._backend) if needed else None

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the model: not its address, which changes when the server is started again."""
        return {"kind": "server", "name": self.name}

    def check(self, control: "Control", sampling: SamplingParams) -> None:
        """Ask for nothing, but refuse a control as `sample` would.

        Raises:
            GeneratorError: the server takes no controls, or not with these settings.
            GenerationError: it has no name for this one.
        """
        ControlFields(self._backend, sampling, self._gamma).of(control)

    def sample(self, requests: Iterable[PromptRequest], sampling: SamplingParams) -> Iterator[Answer]:
        """Yield answers as they come; see `Generator`.

        No more than twice ``concurrency`` answers are asked for beyond those taken, whatever ``requests`` holds.
        Closing the iterator, or an interrupt, abandons the requests under way.

        A stop text belongs to its completion where the server can leave it there (vLLM, SGLang, ``transformers serve``
        do); others take it out, and ids made from their text end with an end token in its place.

        Raises:
            GeneratorError: the server refuses the key or every request, or cannot be reached any more; or a request has
                a control, and the server does not take it.
            GenerationError: it has no name for the control.
        """
        # 1. What all requests have in common, and what is made of the responses.
        fields = self._request_fields(sampling)
        reader, seeds = ResponseReader(sampling, self._encoding), Seeds(self._seeds, self._credentials.hide)
        policy = RetryPolicy(
            Reachability(self._unreachable_timeout, self._address.shown),
            retries=self._retries,
            backoff=self._backoff,
            longest_wait=self._timeout,
            hide=self._credentials.hide,
        )

        # 2. One completion: asked for until it is there, or there is a reason why it is not.
        async def complete(client: openai.AsyncOpenAI, job: _CompletionJob) -> Answer:
            messages = job.messages
            if isinstance(messages, Failure):
                return Answer(job.prompt_id, job.number, messages)
            request = _request(client, {"messages": messages, **fields, **job.extra})

            async def attempt() -> GeneratedText | Failure:
                return reader.read(*await seeds.ask(request, job.seed))

            result = await policy.run(job.prompt_id, attempt)
            if isinstance(result, GeneratedText):
                self.tokens_written += len(result.token_ids)
            return Answer(job.prompt_id, job.number, result)

        # 3. All of them, many at once.
        controls = ControlFields(self._backend, sampling, self._gamma)
        jobs = (job for request in requests for job in _jobs(request, controls, sampling.seed))
        try:
            largest = LARGEST_REPLY + BYTES_PER_TOKEN * sampling.max_tokens
            opener = self._client_opener(largest, self._timeout)
            yield from EventLoopThread(jobs, self._concurrency, opener, complete).results()
        finally:
            reader.report()

    def _request_fields(self, sampling: SamplingParams) -> dict[str, Any]:
        """Fields of every request of a run.

        Raises:
            GeneratorError: one of them cannot be sent.
        """
        ends = self._encoding.ends if self._encoding else []
        fields: dict[str, Any] = {
            "model": self.name,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._backend.limit: sampling.max_tokens,
            **self._backend.fields(sampling, ends),
        }
        if sampling.stop:
            fields["stop"] = list(sampling.stop)
        if self._logprobs and not (self._backend.scaled and sampling.temperature != 1):
            fields["logprobs"] = True
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise GeneratorError(f"a setting holds half a character, which no request can carry: {error}") from None
        return fields

    def _client_opener(self, largest: int, deadline: float) -> Callable[[], openai.AsyncOpenAI]:
        return lambda: open_client(self._address, self._credentials, deadline=deadline, largest=largest)


@dataclass(frozen=True)
class _CompletionJob:
    """One completion to ask for.

    Attributes:
        prompt_id: of its prompt.
        number: which of the prompt's completions.
        messages: that ask for it; or why none can.
        seed: of the completion.
        extra: fields of this request alone.
    """

    prompt_id: str
    number: int
    messages: list[dict[str, Any]] | Failure
    seed: int
    extra: dict[str, Any]


def _jobs(request: PromptRequest, controls: ControlFields, seed: int) -> Iterator[_CompletionJob]:
    """The completions of a request."""
    extra = controls.of(request.control)
    try:
        messages: list[dict[str, Any]] | Failure = chat_messages(request.prompt)
    except ValueError as error:
        messages = Failure(str(error), final=True)
    prompt_id = request.prompt.prompt_id
    for number in request.numbers:
        yield _CompletionJob(prompt_id, number, messages, completion_seed(seed, prompt_id, number), extra)


def _request(client: openai.AsyncOpenAI, body: dict[str, Any]) -> Callable[[int | None], Awaitable[bytes]]:
    """What sends a request once, with a seed or without; raises what the client does.

    The reply comes as bytes: the client would make its own types of it without looking.
    """

    async def send(seed: int | None) -> bytes:
        given = body if seed is None else {**body, "seed": seed}
        return await answered(client.post("/chat/completions", body=given, cast_to=bytes))

    return send
