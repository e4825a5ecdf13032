"""What the server does, without HTTP: prompts to jobs, and what is known of lengths before anything is written."""

import asyncio
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..decoding.arguments import room_for
from ..decoding.limits import context_window
from ..decoding.read_back import read_back
from ..decoding.sampling_params import SamplingParams, completion_seed
from ..decoding.segments import why_not_until
from ..decoding.text_stream import ends_with_stop
from ..errors import GenerationError, reason_of
from ..evaluation.prediction import quantiles_at
from ..guidance import Control, target_of, until_of
from ..inspection.rollout_values import values_of
from ..rollouts.generators.interface import Prompt
from ..rollouts.generators.local import LocalGenerator
from .answers import Answer
from .engine_loop import EngineLoop, Job
from .expected_tokens import expected_tokens
from .requests import GenerationRequest, Message
from .waiting import PATIENCE, Order


@dataclass(frozen=True)
class Limits:
    """How much one client may ask for.

    Attributes:
        n: completions of a request, all prompts together.
        max_tokens: of a completion.
        images: of a request.
        waiting: completions that wait beside those that are written; more are refused with 429.
    """

    n: int = 64
    max_tokens: int = 32768
    images: int = 8
    waiting: int = 1024


class Service:
    """Generator, length value model and engine behind the endpoints. A context manager.

    Args:
        generator: with its length value model, where it has one.
        limits: of requests.
        order: which of those that wait, of one priority, are started first.
        patience: see `waiting.rank`.

    Raises:
        GenerationError: the generator cannot be decoded in rows, or there is nothing that predicts the ``shortest``.
    """

    def __init__(
        self, generator: LocalGenerator, limits: Limits, order: Order = "arrival", patience: float = PATIENCE
    ) -> None:
        self.generator = generator
        self.limits = limits
        self.tokenizer = generator.tokenizer
        engines = generator.engines(1)
        if not engines:
            raise GenerationError(f"{generator.name} cannot be decoded in rows of a cache, as a server does")
        [engine] = engines
        predict = None
        if order == "shortest":
            if generator.lenvm is None:
                raise GenerationError("shortest first needs a length value model, which predicts what is short")
            if (until := generator.lenvm.config.until) is not None:
                raise GenerationError(f"shortest first: this length value model counts to {until!r}, not to the end")
            predict = functools.partial(expected_tokens, generator.lenvm)
        self.engine_loop = EngineLoop(engine, generator.rows + limits.waiting, predict=predict, patience=patience)
        # Prompts are made ready one after the other: tokenizers and processors are not to be shared by threads.
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prompts")

    def __enter__(self) -> "Service":
        self.engine_loop.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.engine_loop.__exit__(*error)
        self._preparing.shutdown(wait=False, cancel_futures=True)

    async def prepared(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Do what needs tokenizer, processor or models, beside the event loop and not all at once."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, work, *arguments)

    async def prepare(
        self, asked: GenerationRequest, prompts: Sequence[Prompt | list[int]], most: int | None
    ) -> list[Job]:
        """Make the completions of some prompts ready to be written.

        Args:
            asked: how.
            prompts: chats, or ids.
            most: tokens of a completion; None where nobody says.

        Raises:
            ValueError: they cannot be answered; the text says why.
        """
        control = asked.control()
        if control is not None and self.generator.lenvm is None:
            raise ValueError("lenvm: there is no length value model here; start the server with --lenvm")
        await self.prepared(self._require_its_control, control)
        n = asked.n or 1
        self.require_few(n * len(prompts))
        if most is not None and most > self.limits.max_tokens:
            raise ValueError(f"max_tokens={most} is more than this server allows, {self.limits.max_tokens}")
        loop = asyncio.get_running_loop()
        jobs = []
        for number, prompt in enumerate(prompts):
            ids, inputs, sampling = await self.prepared(self._encode, asked, prompt, control, most)
            seeds = [completion_seed(sampling.seed + number, "", k) for k in range(n)]
            ends = ends_with_stop(sampling.stop, self.tokenizer)
            jobs.append(Job(ids, seeds, sampling, control, inputs, ends, loop, asked.priority or 0))
        return jobs

    def begin(self, jobs: Sequence[Job]) -> None:
        """Begin to write, all of them or none.

        Raises:
            QueueFullError: there is no room for them now.
        """
        begun: list[Job] = []
        try:
            for job in jobs:
                self.engine_loop.submit(job)
                begun.append(job)
        except BaseException:
            self.cancel(begun)
            raise

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody reads them any longer."""
        for job in jobs:
            self.engine_loop.cancel(job)

    def require_few(self, completions: int) -> None:
        """Refuse more completions than one request may have.

        Raises:
            ValueError: they are more.
        """
        if completions > self.limits.n:
            raise ValueError(f"{completions} completions are more than {self.limits.n} (n times prompts)")

    def _require_its_control(self, control: Control | None) -> None:
        """Refuse a control that counts to something else than the length value model.

        Raises:
            ValueError: it does.
        """
        lenvm = self.generator.lenvm
        if lenvm is not None and (against := why_not_until(control, lenvm.config.until, self.tokenizer)):
            raise ValueError(f"lenvm: {against}")

    def _encode(
        self, asked: GenerationRequest, prompt: Prompt | list[int], control: Control | None, most: int | None
    ) -> tuple[list[int], dict[str, Any], SamplingParams]:
        """Ids, tensors of images, and sampling: as much as there is room for, where nobody says.

        Raises:
            ValueError: it cannot be answered.
        """
        guided = control is not None
        sampling = asked.sampling(1 if most is None else most, guided)
        try:
            ids, inputs = self.generator.encode(prompt, sampling, control if most is not None else None)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(reason_of(error)) from error
        if most is None:
            room = min(self._window() - len(ids), self.limits.max_tokens)
            target = target_of(control)
            wanted = room_for(target, until_of(control))
            if target is not None and room < target:
                raise ValueError(f"lenvm: a target of {target} tokens, and room for {room:g} behind this prompt")
            sampling = asked.sampling(int(min(room, wanted)), guided)
        return ids, inputs, sampling

    def _window(self) -> float:
        lenvm = self.generator.lenvm
        return context_window([self.generator.model, *([lenvm.backbone] if lenvm else [])])

    def chat(self, messages: Sequence[Message], prompt_id: str = "chat") -> Prompt:
        """A chat as a prompt. Its images stay as they came until they are encoded, for opened they are large.

        Raises:
            ValueError: an image that does not come with the request, or too many of them.
        """
        contents: list[bytes] = []
        read = [message.read(contents) for message in messages]
        if len(contents) > self.limits.images:
            raise ValueError(f"{len(contents)} images are more than {self.limits.images}")
        if contents and not self.generator.takes_images:
            raise ValueError(f"the prompt has images, but {self.generator.name} reads text only")
        return Prompt(prompt_id, read, tuple(contents))

    async def read_back(self, answers: Sequence[Answer], likeliest: int) -> None:
        """Read prompts and completions with the generator, for the log-probabilities of all of their tokens.

        Raises:
            QueueFullError: the server is about to end.
        """
        model = self.generator.model
        for answer in answers:
            ids = [*answer.prompt_ids, *answer.token_ids]
            reading = self.engine_loop.call(functools.partial(read_back, model, ids, likeliest))
            answer.read = await asyncio.wrap_future(reading)

    async def lengths(
        self, prompts: Sequence[Prompt], completion: str | None, quantiles: Sequence[float]
    ) -> list[dict[str, Any]]:
        """Expected lengths before anything is written, and along a completion where one is given.

        Args:
            prompts: what is asked.
            completion: an answer to be read beside them.
            quantiles: levels that are told where the length value model says how sure it is.

        Raises:
            ValueError: a prompt that cannot be read, or no length value model.
            QueueFullError: the server is about to end.
        """
        return await asyncio.wrap_future(self.engine_loop.call(lambda: self._lengths(prompts, completion, quantiles)))

    def _lengths(
        self, prompts: Sequence[Prompt], completion: str | None, quantiles: Sequence[float]
    ) -> list[dict[str, Any]]:
        lenvm = self.generator.lenvm
        if lenvm is None:
            raise ValueError("there is no length value model here; start the server with --lenvm")
        ids = [] if completion is None else self.tokenizer(completion, add_special_tokens=False)["input_ids"]
        pairs = ((prompt, ids) for prompt in prompts)
        found: dict[int, Any] = dict(values_of(lenvm, self.generator.processor, pairs, all_heads=True))
        told = []
        for number in range(len(prompts)):
            outputs = found[number]
            if isinstance(outputs, str):
                raise ValueError(f"prompt {number}: {outputs}")
            logits = outputs[:, 0]
            remaining, value = lenvm.remaining(logits).tolist(), lenvm.value(logits).tolist()
            for place, token in enumerate(ids, start=1):
                if token in self.generator.stop_ids:  # nothing follows, which the model is never asked
                    remaining[place] = value[place] = 0.0
            if not all(map(math.isfinite, remaining)):
                raise GenerationError("the length value model gives no number here: it is broken")
            one: dict[str, Any] = {"index": number, "expected_tokens": remaining[0]}
            if lenvm.config.until is not None:
                one["until"] = lenvm.config.until  # what it counts to; behind that its numbers mean nothing
            if lenvm.says_how_sure:
                one["quantiles"] = {repr(q): n for q, n in quantiles_at(lenvm, outputs[0], 0, quantiles).items()}
            if completion is not None:
                texts = [self.tokenizer.decode([token]) for token in ids]
                one["tokens"] = [
                    {"id": token, "text": text, "remaining": after, "value": of_state}
                    for token, text, after, of_state in zip(ids, texts, remaining[1:], value[1:], strict=True)
                ]
            told.append(one)
        return told
